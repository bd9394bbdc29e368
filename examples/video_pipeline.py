"""Quantize the transformer of a video diffusion pipeline, and sample from the packed pipeline."""

import json
import sys
from pathlib import Path

import torch

import qkit


def main(folder: Path) -> None:
    out = folder / "tiny-video-w8a8"
    report = qkit.quantize("tiny-video", scheme="w8a8", method="smoothquant", out=out, samples=4)
    print(f"{report.linears} quantized layers, {report.bytes / 1e6:.2f} MB")

    pipeline = qkit.load(out, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((out / "sampling.json").read_text())["call"]  # size and length of this model's videos
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(prompt="a red circle moves left", generator=generator, output_type="np", **call).frames
    print("frames:", frames.shape)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
