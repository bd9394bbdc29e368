"""The tables of README.md, from the tables of the code.

python tools/readme_tables.py            print them
python tools/readme_tables.py --write    put them between the two marks in README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from qkit.commands import list as listing
from qkit.tensor.formats import SCHEMES, Format, Scheme, layout
from qkit.verification.engines import engine_fits

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- tables:begin -->", "<!-- tables:end -->"

Row = dict[str, Any]


def tables() -> str:
    """Schemes, methods and families as Markdown; rows that differ only in their names share a line."""
    return "\n\n".join(
        [
            markdown(merge([scheme_row(s) for s in SCHEMES.values()], ("scheme", "weights"))),
            markdown(listing.methods()),
            markdown(merge(listing.formats(), ("format", "bits"))),
            markdown(listing.families()),
        ]
    )


def scheme_row(scheme: Scheme) -> Row:
    row = next(row for row in listing.schemes() if row["scheme"] == scheme.name)
    return {**row, "vLLM loads it as": vllm(scheme.weights, scheme.activations)}


def vllm(weights: Format, activations: Format | None) -> str:
    fits = engine_fits(weights, activations, layout(weights, activations))
    return next(fit.loads_as for fit in fits if fit.engine == "vLLM") or "-"


def merge(rows: list[Row], joined: tuple[str, ...]) -> list[Row]:
    """One row for all that agree in every column but ``joined``, whose values are listed."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(v) for k, v in row.items() if k not in joined), []).append(row)
    return [
        {k: spans([str(r[k]) for r in same]) if k in joined else v for k, v in same[0].items()}
        for same in groups.values()
    ]


def spans(names: list[str]) -> str:
    """['int2', 'int3', 'int4', 'fp8'] -> 'int2 to int4, fp8': three or more names that count up become a span."""
    runs: list[list[str]] = []
    for name in dict.fromkeys(names):
        if runs and following(runs[-1][-1]) == name:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def following(name: str) -> str:
    """The name with its first number one higher."""
    return re.sub(r"\d+", lambda number: str(int(number[0]) + 1), name, count=1)


def markdown(rows: list[Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def updated(readme: str) -> str:
    """The README with its tables as the code has them now."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md: the marks {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(tables() + "\n")
