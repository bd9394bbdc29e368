"""Giving memory back to the system.

glibc keeps what a program frees, in pieces that its next large tensor may not fit into; over many blocks the resident
size creeps up. ``give_back`` returns what is free; where the C library has no such call it does nothing.
"""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # names of glibc's malloc.h

# What torch, threads and the loader of libraries say of memory that they did not get.
_ALLOCATORS = (
    *("DefaultCPUAllocator: ", "not enough memory", "CUDA out of memory", "can't start new thread"),
    *("failed to map segment", "annot allocate memory"),
)


def bound_heap() -> None:
    """For a process of our own (the command line): two heaps for all threads, and tensors of 16 MB and more outside them.

    By default every thread grows a heap of its own and large blocks stay in it; of a single one threads wait for each other.
    Measured: peak of gptq on a Llama with hidden size 1024 0.79 GB by default, 0.78 with one, 0.76 with two; learned rounding
    of tiny-llama on two cores 47 s with one, 45 with two.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_ARENA_MAX, 2)
        mallopt(_MMAP_THRESHOLD, 16 << 20)


def give_back() -> None:
    """Return free heap memory to the system (milliseconds)."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's own, one of torch's allocators, or of a library to load."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in _ALLOCATORS)
