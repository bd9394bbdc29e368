"""Write qkit/planning/measured_losses.json, by which ``qkit recommend`` compares schemes: from levels-smollm2.json beside this
file and ../kvcache/serving.json, which have to be there.

    python reports/comparison/losses.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qkit.planning.measured_losses import FILE
from qkit.planning.quality_levels import DEFAULT

HERE = Path(__file__).resolve().parent
MODEL, TEXT, CONTEXT = "SmolLM2-135M-Instruct", "WikiText-2", 2048
OF_TEXT = {"WikiText-2": "wikitext2"}
CACHES = ("int8_per_token_head", "fp8")
DIGITS = 3


def rounded(x: float) -> float:
    """With the digits that figures have."""
    return float(f"{x:.{DIGITS}g}")


def losses() -> dict[str, Any]:
    """What the file holds."""
    levels = json.loads((HERE / "levels-smollm2.json").read_text())
    serving = json.loads((HERE.parent / "kvcache" / "serving.json").read_text())
    caches = serving["files"]["fp8"]["contexts"][str(CONTEXT)]["caches"]
    rows = [row for row in levels if row["level"] == DEFAULT and ":" not in row["scheme"]]  # groups as by default
    return {
        "model": MODEL,
        "quality": DEFAULT,
        "text": TEXT,
        "cache_context": CONTEXT,
        "schemes": {row["scheme"].upper(): rounded(row[OF_TEXT[TEXT]]["kl"]) for row in rows},
        "caches": {c["dtype"]: rounded(c["kl"]) for c in caches if c["dtype"] in CACHES and not c["skip"]},
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(losses(), indent=1) + "\n")
