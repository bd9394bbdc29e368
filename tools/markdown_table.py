"""Rows as a Markdown table."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """A Markdown table with the keys of the first row as its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
