"""Times of short pieces of work."""

from __future__ import annotations

import time
from collections.abc import Callable


def fastest_run(run: Callable[[], object], times: int = 15) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
