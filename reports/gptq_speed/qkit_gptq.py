"""Times one GPTQ run of qkit in a process of its own, as the command line runs it.

seconds of `quantize` cover everything from the checkpoint on disk to the proven output folder: calibration, solving,
export, and verification. `prepare` (config, tokenising the text, plan) and imports are reported apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

START = time.monotonic()


class Silent:
    """No progress output."""

    def start(self, what: str, total: int) -> None:
        """A new phase."""

    def step(self, amount: int = 1) -> None:
        """Part of a phase."""


def main() -> None:
    """Run once and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "calib", "out", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args()

    from qkit.system.memory import bound_heap

    bound_heap()
    import torch

    from qkit.workflows.quantize import Request, prepare, quantize

    imported = time.monotonic()
    request = Request(
        model=str(args.model),
        scheme=args.scheme,
        method=args.method,
        calib=args.calib,
        samples=args.samples,
        seqlen=args.seqlen,
    )
    found = prepare(request)
    prepared = time.monotonic()
    report = quantize(request, args.out, Silent(), prepared=found)
    done = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "tool": "qkit",
        "import_s": imported - START,
        "prepare_s": prepared - imported,
        "quantize_s": done - prepared,
        "process_s": done - START,
        "peak_rss_bytes": peak,
        "forecast_peak_bytes": found.forecast.peak_memory,
        "output_bytes": report.bytes,
        "torch": torch.__version__,
        "cores": torch.get_num_threads(),
    }
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
