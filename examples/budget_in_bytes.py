"""Let a size in bytes choose the format of every layer.

qkit measures what each layer costs in each candidate format (the profile), and solves for the best choice under the budget.
"""

import sys
from collections import Counter
from pathlib import Path

import qkit


def main(folder: Path) -> None:
    calibration = {"samples": 16, "seqlen": 128}
    profile = folder / "profile"
    qkit.profile("tiny-llama", candidates="int3,int4,int8", measures=["kl"], rows=2, out=profile, **calibration)

    budget = {"size": "5.2MB", "method": "gptq", "profile": profile, "out": folder / "mixed", **calibration}
    forecast = qkit.plan("tiny-llama", **budget)
    formats = Counter(linear.weights.name for linear in forecast.prepared.plan.linears.values())
    print("planned:", dict(formats), f"{forecast.prepared.forecast.packed_bytes / 1e6:.2f} MB")

    report = qkit.quantize("tiny-llama", **budget)
    print(f"written: {report.bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
