"""The table of docs/convert.md from the figures of matrix.py.

    python reports/convert/table.py reports/convert/matrix.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

EXPORTS = ("gptq", "awq", "modelopt", "mlx", "compressed-tensors")
REASONS = {
    "its inputs are quantized": "inputs",
    "bits, and": "bits",
    "has no name for": "format",
    "stores integers": "format",
    "no place for the scales of an FP8 KV cache": "KV cache",
    "for the whole model": "mixed",
    "one scale per channel, and MLX": "channels",
    "groups of": "groups",
    "which has one": "format",
    "MLX stores integers": "format",
    "numbers that": "scales of 32 bits",
}


def read(found: dict[str, Any]) -> str:
    """How many weights the other reader decodes to the same numbers."""
    if "reader" in found:
        return "no reader"
    same = found["equal"] + found["equal with its rounded scales"]
    close = f", others within {found['largest']:.1e}" if same < found["linears"] else ""
    return f"{same} of {found['linears']} in {found['dtype']}{close}"


def cell(found: dict[str, Any]) -> str:
    """A conversion: how many float32 weights are equal, or what the layout has no place for."""
    if "refused" not in found:
        return f"{found['equal']} of {found['linears']}"
    return next((f"refused: {short}" for part, short in REASONS.items() if part in found["refused"]), "refused")


if __name__ == "__main__":
    rows = json.loads(Path(sys.argv[1]).read_text())
    print(f"| file | own reader | {' | '.join(f'to `{e}`' for e in EXPORTS)} |")
    print("| --- " * (2 + len(EXPORTS)) + "|")
    for name, row in rows.items():
        cells = ["refused"] + ["-"] * len(EXPORTS) if "refused" in row else [read(row["read"]), *(cell(row[e]) for e in EXPORTS)]
        print(f"| {name} | {' | '.join(cells)} |")
