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
from collections.abc import Callable
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
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # about a fork beside threads: the copy waits for none of their locks
        child = os.fork()
    if child == 0:
        _serve(work, send, seconds, memory)
    os.close(send)
    try:
        answer = _received(receive, time.monotonic() + seconds, seconds, memory)
    finally:
        os.close(receive)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not answer:  # ended by the system, for its memory or its processor time
        raise Exceeded(_more(seconds, memory))
    kind, value, text = json.loads(answer)
    if kind == "MemoryError":
        raise Exceeded(f"more than {memory >> 20} MB")
    if kind:
        raise Failed(kind, text)
    return value


def _more(seconds: float, memory: int) -> str:
    return f"more than {seconds:g} s or {memory >> 20} MB"


def _received(receive: int, deadline: float, seconds: float, memory: int) -> bytes:
    answer = bytearray()
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([receive], [], [], remaining)[0]:
            raise Exceeded(f"more than {seconds:g} s")
        chunk = os.read(receive, _CHUNK)
        if not chunk:
            return bytes(answer)
        answer += chunk
        if len(answer) > memory:
            raise Exceeded(f"more than {memory >> 20} MB")


def _serve(work: Callable[[], Any], send: int, seconds: float, memory: int) -> NoReturn:
    """Run the work in the copy, which exits without the handlers and buffers that it shares with the original."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        _limit(seconds, memory)
        try:
            answer = json.dumps(["", work(), ""])
        except MemoryError:
            answer = json.dumps(["MemoryError", None, ""])
        except Exception as e:  # any exception of the library that does the work is sent to the original
            answer = json.dumps([type(e).__name__, None, str(e)[:2000]])
        data = memoryview(answer.encode("ascii"))
        while data:
            data = data[os.write(send, data) :]
    except BaseException:
        os._exit(1)
    os._exit(0)


def _limit(seconds: float, memory: int) -> None:
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    with suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
