"""The mark of a result that failed its budget: one file in its folder, written and removed by ``qkit check`` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkit.errors import QkitError
from qkit.files.folder import RECORD, load_json
from qkit.files.safefile import write_atomic

NAME = "qkit-rejected.json"
_MADE_BY = "qkit check"


class RejectedWarning(UserWarning):
    """The warning for a loaded model that failed its budget."""


def read_mark(folder: Path) -> dict[str, Any] | None:
    """The mark of the last failed ``qkit check`` of the folder; None where the check passed, or there was none.

    {"budget": file name, "baseline": folder name or None, "failed": [{"name", "limit", "measured"}], ...}
    """
    if not (folder / NAME).is_file():
        return None
    try:
        mark = load_json(folder / NAME, "mark")
    except QkitError:
        return None
    return mark if isinstance(mark, dict) and mark.get("made_by") == _MADE_BY else None


def describe_mark(mark: dict[str, Any]) -> str:
    """The mark in one line; what was read from the file is shown without control characters."""
    failed = mark.get("failed")
    names = [str(f.get("name")) for f in failed if isinstance(f, dict)] if isinstance(failed, list) else []
    text = f"rejected by 'qkit check' with the budget {mark.get('budget')}: not kept: {', '.join(names) or 'unknown'}"
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:400]


def write_mark(folder: Path, version: str, budget: str, baseline: str | None, failed: Sequence[dict[str, Any]]) -> bool:
    """Mark a folder that qkit exported; False, and nothing is written, where it is another one. Raises IOFailure."""
    if not (folder / RECORD).is_file() or ((folder / NAME).exists() and read_mark(folder) is None):
        return False
    mark = {"made_by": _MADE_BY, "version": version, "budget": budget, "baseline": baseline, "failed": list(failed)}
    write_atomic(folder / NAME, (json.dumps(mark, indent=1, sort_keys=True) + "\n").encode())
    return True


def clear_mark(folder: Path) -> None:
    """Remove the mark, if it is one."""
    if read_mark(folder) is not None:
        (folder / NAME).unlink(missing_ok=True)
