"""Parallel work whose results do not depend on the number of cores.

A multi-threaded matrix product may add in another order when the number of threads changes, and so give another last
bit. Here every operation runs on one thread, the work is cut into pieces of fixed size, and the pieces go to a
pool of workers: the result does not depend on how many workers there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from qkit.system.machine import available_cores

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool that maps a function over items; results come in the order of the items."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, initializer=_one_thread) if count > 1 else None

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results of ``work`` for every item, computed without gradients. Raises the first exception."""

        def one(item: T) -> R:
            with torch.inference_mode():
                return work(item)

        return [one(i) for i in items] if self._pool is None else list(self._pool.map(one, items))

    def stream(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Like ``map``, but yields results one by one while workers process the next items.

        At most ``count`` + 1 items are in progress or waiting, so no worker idles while a result is used.
        """

        def one(item: T) -> R:
            with torch.inference_mode():
                return work(item)

        if self._pool is None:
            yield from map(one, items)
            return
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(self._pool.submit(one, item))
            if len(waiting) > self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """Wait for the pool's threads to end."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def workers(count: int | None = None) -> Iterator[Workers]:
    """``count`` workers (default: all cores) with single-threaded torch inside; torch's setting is restored after."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Workers(count or available_cores())
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(threads_before)
