"""Frames of the same prompts and seeds by several pipelines, one below the other, as a picture.

    python reports/video/picture.py PICTURE.png tiny-video OUT [OUT ..] [--prompts 4]

The first pipeline says prompts and arguments. Nine frames of every sample, and a gap between prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qkit.diffusion.trajectory import sampling_of
from qkit.evaluation.video import held_out, make_video
from qkit.runtime.loading import load
from qkit.files.locate import find_model

SCALE, GAP = 2, 6


def main() -> None:
    """Sample and paint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("pipelines", nargs="+")
    parser.add_argument("--prompts", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sampling = sampling_of(find_model(args.pipelines[0]), None, {})
    rows: list[list[np.ndarray]] = [[] for _ in range(args.prompts)]
    for name in args.pipelines:
        pipeline = load(find_model(name), dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        for i, row in enumerate(rows):
            prompt, seed = held_out(sampling, i)
            frames = make_video(pipeline, prompt, sampling.call, seed).frames
            strip = np.concatenate(list((frames.clamp(0, 1) * 255).round().byte().numpy()), 1)
            row.append(strip.repeat(SCALE, 0).repeat(SCALE, 1))
            if name == args.pipelines[0]:
                print(prompt)
    gap = np.full((GAP, rows[0][0].shape[1], 3), 255, dtype=np.uint8)
    whole = np.concatenate([part for row in rows for part in (*row, gap)][:-1], 0)
    Image.fromarray(whole).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
