"""A strict JSON reader: text that two readers could understand in two ways is refused.

Part of the independent proof of a packed checkpoint (see ``verify.py``).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [k for k, _ in pairs]
    if len(set(keys)) != len(keys):
        duplicate = next(k for k, n in Counter(keys).items() if n > 1)
        raise ValueError(f"the key '{duplicate}' is given twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is out of range")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, read strictly: no duplicate keys, no NaN or Infinity, UTF-8. Raises ValueError."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("the nesting is too deep") from None
