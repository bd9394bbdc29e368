"""Quantize a language model to 4 bits, prove the result, and measure what it cost."""

import sys
from pathlib import Path

import qkit


def main(folder: Path) -> None:
    out = folder / "tiny-llama-w4a16"
    # For a model of your own: its folder or hub id, and calib="your_text.txt".
    report = qkit.quantize("tiny-llama", scheme="w4a16", method="gptq", out=out, samples=32)
    print(f"{report.linears} quantized layers, {report.bytes / 1e6:.2f} MB, {sum(report.checks.values()):,} checks")

    measured = qkit.evaluate(out, baseline="tiny-llama", windows=8)
    for name, figures in measured["texts"].items():
        change = 100 * (figures["perplexity"] / figures["baseline_perplexity"] - 1)
        print(f"{name}: perplexity {figures['perplexity']:.2f}, {change:+.2f} % against the original")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
