"""Matches the regular expressions of a quantization config ('re:' and a pattern), within a time limit.

They come from a file, and one such as '(a+)+$' can run for ever on a name that it does not match. The loader and the
independent verification use this module; they share no other code for reading a config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qkit.system.confined import Exceeded, Failed, confined

PREFIX = "re:"
LONGEST = 2000  # characters of a pattern; real ones have about fifty


def is_pattern(target: object) -> bool:
    """Whether a value is a valid target: the name of a module or class, or 're:' and a valid pattern."""
    if not isinstance(target, str) or target in ("", PREFIX) or len(target) > LONGEST:
        return False
    try:
        return not target.startswith(PREFIX) or bool(re.compile(target[len(PREFIX) :]))
    except (re.error, RecursionError, OverflowError):
        return False


def matched(targets: Iterable[str], names: Sequence[str]) -> dict[str, frozenset[str]]:
    """{target with a pattern: names that it matches from their start}. Raises ValueError where matching takes too long."""
    patterns = sorted({t for t in targets if t.startswith(PREFIX)})
    if not patterns or not names:
        return {}

    def search() -> list[list[int]]:
        regexes = [re.compile(p[len(PREFIX) :]) for p in patterns]
        return [[i for i, name in enumerate(names) if regex.match(name)] for regex in regexes]

    try:
        indices_by_pattern = confined(search)
    except Exceeded as e:
        raise ValueError(f"matching its {len(patterns)} patterns takes {e}") from None
    except Failed as e:
        raise ValueError(f"a pattern cannot be used: {e}") from None
    return {p: frozenset(names[i] for i in indices) for p, indices in zip(patterns, indices_by_pattern, strict=True)}
