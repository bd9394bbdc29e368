"""The regular expressions of a quantization config ('re:' and a pattern), matched within a limit of time.

They come with the file that is read, and one such as '(a+)+$' takes for ever on a name that it does not match. Used by the
loader and by the independent proof, which share nothing else of a config's reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qkit.system.confined import Exceeded, Failed, confined

PREFIX = "re:"
LONGEST = 2000  # characters of a pattern; real ones have some fifty


def is_pattern(target: object) -> bool:
    """Whether it can be a target: the name of a module or of a class, or 're:' and a sound pattern."""
    if not isinstance(target, str) or target in ("", PREFIX) or len(target) > LONGEST:
        return False
    try:
        return not target.startswith(PREFIX) or bool(re.compile(target[len(PREFIX) :]))
    except (re.error, RecursionError, OverflowError):
        return False


def matched(targets: Iterable[str], names: Sequence[str]) -> dict[str, frozenset[str]]:
    """{target with a pattern: the names that it matches, from their start}. Raises ValueError where that takes too long."""
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
