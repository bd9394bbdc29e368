"""Runs work on untrusted input in a process of its own, with limits on its time and memory.

A chat template or a regular expression of a model can run for ever or fill the memory, and neither library can be stopped from
outside. So a copy of this process does the work, and is ended when it exceeds its limits. This module imports nothing of qkit,
since the independent verification of a checkpoint uses it, too.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

SECONDS, BYTES = 5.0, 512 << 20
_CHUNK = 1 << 16


class Exceeded(Exception):
    """The work exceeded a limit; the message names it: 'more than 5 s'."""


class Failed(Exception):
    """The work raised an exception; the message is that exception's, ``kind`` the name of its class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def confined(work: Callable[[], Any], seconds: float = SECONDS, memory: int = BYTES) -> Any:
    """What ``work`` returns, as JSON can carry it. Raises Exceeded or Failed.

    memory: bytes beyond what this process has already; where the system cannot limit them, time alone is limited.
    """
    outcome = confined_each([work], seconds, memory)[0]
    if isinstance(outcome, (Exceeded, Failed)):
        raise outcome
    return outcome


def confined_each(works: Sequence[Callable[[], Any]], seconds: float = SECONDS, memory: int = BYTES) -> list[Any]:
    """What each of these returns, as JSON can carry it, or the Failed that it raised; all in one copy of this process, since
    copying a large one takes longer than most work does. The first that exceeds a limit is the last, with an Exceeded.

    seconds: for each of them; memory: as above, for all together
    """
    if not works:
        return []
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # about a fork beside threads: the copy waits for none of their locks
        child = os.fork()
    if child == 0:
        _serve(works, send, seconds, memory)
    os.close(send)
    outcomes: list[Any] = []
    try:
        for answer in _received(receive, len(works), seconds, memory):
            outcomes.append(_outcome(answer, memory))
            if isinstance(outcomes[-1], Exceeded):
                break
    except Exceeded as e:
        outcomes.append(e)
    finally:
        os.close(receive)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return outcomes


def _outcome(answer: bytes, memory: int) -> Any:
    kind, value, text = json.loads(answer)
    if kind == "MemoryError":
        return Exceeded(f"more than {memory >> 20} MB")
    return Failed(kind, text) if kind else value


def _received(receive: int, count: int, seconds: float, memory: int) -> Iterator[bytes]:
    """So many answers, a line each. Raises Exceeded for one that does not come in time."""
    buffer = bytearray()
    for _ in range(count):
        deadline, searched = time.monotonic() + seconds, 0
        while (end := buffer.find(b"\n", searched)) < 0:
            searched = len(buffer)
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([receive], [], [], remaining)[0]:
                raise Exceeded(f"more than {seconds:g} s")
            chunk = os.read(receive, _CHUNK)
            if not chunk:  # ended by the system, for its memory or its processor time
                raise Exceeded(f"more than {seconds:g} s or {memory >> 20} MB")
            buffer += chunk
            if len(buffer) > memory:
                raise Exceeded(f"more than {memory >> 20} MB")
        answer = bytes(buffer[:end])
        del buffer[: end + 1]
        yield answer


def _serve(works: Sequence[Callable[[], Any]], send: int, seconds: float, memory: int) -> NoReturn:
    """Run the work in the copy, which exits without the handlers and buffers that it shares with the original."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        _limit(memory)
        for work in works:
            _limit_processor(seconds)
            data = memoryview(_answer(work).encode("ascii") + b"\n")
            while data:
                data = data[os.write(send, data) :]
    except BaseException:
        os._exit(1)
    os._exit(0)


def _answer(work: Callable[[], Any]) -> str:
    try:
        return json.dumps(["", work(), ""])
    except MemoryError:
        return json.dumps(["MemoryError", None, ""])
    except Exception as e:  # any exception of the library that does the work is sent to the original
        return json.dumps([type(e).__name__, None, str(e)[:2000]])


def _limit_processor(seconds: float) -> None:
    """Limit the processor time of what follows; the system ends the copy that needs more."""
    with suppress(OSError, ValueError):
        used, hard = time.process_time(), resource.getrlimit(resource.RLIMIT_CPU)[1]
        limit = int(used + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limit(memory: int) -> None:
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
