"""Quantize a vision-language model. MBQ weighs errors at images against errors at answers (arXiv 2412.19509)."""

import sys
from pathlib import Path

import qkit


def main(folder: Path) -> None:
    out = folder / "tiny-vlm-w3a16"
    # For a model of your own: calib="data.jsonl", lines with "image", "question" and "answer".
    report = qkit.quantize(
        "tiny-vlm", scheme="w3a16", method="mbq", targets={"vision": "w8a8", "projector": "skip"}, out=out, samples=16
    )
    print(f"{report.linears} quantized layers, {report.bytes / 1e6:.2f} MB")
    print(type(qkit.load(out)).__name__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
