"""Former names of method options: they go on working for one version."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from qkit.errors import RenamedWarning, UsageError
from qkit.solvers.table import SOLVERS
from qkit.system.option import Options
from qkit.transforms.table import TRANSFORMS

_TABLES: list[Options] = [
    *(solver.options for solver in SOLVERS.values()),
    *(transform.options for transform in TRANSFORMS.values()),
]
FORMER = {option.formerly: name for options in _TABLES for name, option in options.items() if option.formerly}


def current_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under their names of today, with a RenamedWarning for each former name.

    Raises UsageError where an option has both names.
    """
    for old in (name for name in options if name in FORMER):
        new = FORMER[old]
        if new in options:
            raise UsageError(f"option '{old}' is the former name of '{new}', and both are used: use '{new}' alone")
        warnings.warn(
            f"option '{old}' is now '{new}': the old name goes in the next version", RenamedWarning, stacklevel=2
        )
    return {FORMER.get(name, name): value for name, value in options.items()}


def record_under_current_names(record: Any) -> Any:
    """A record of an earlier version with every option in it under its name of today."""
    if isinstance(record, list):
        return [record_under_current_names(value) for value in record]
    if not isinstance(record, dict):
        return record
    found = {key: record_under_current_names(value) for key, value in record.items()}
    if isinstance(found.get("options"), dict):
        found["options"] = {FORMER.get(name, name): value for name, value in found["options"].items()}
    return found
