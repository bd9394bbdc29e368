"""Returns free memory to the system, and tells when memory runs out.

glibc keeps memory that a program frees, in pieces that may be too small for its next large tensor. Over many blocks the
resident size grows. ``give_back`` returns free memory; where the C library has no such call, it does nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # names of glibc's malloc.h

_LIBRARIES = 256 << 20  # bytes of address space for numpy and what it loads

# Messages of torch, threads and the loader of libraries when memory runs out.
_ALLOCATORS = (
    *("DefaultCPUAllocator: ", "not enough memory", "CUDA out of memory", "can't start new thread"),
    *("failed to map segment", "annot allocate memory"),
)


def bound_heap() -> None:
    """Limit the process to two heaps for all threads, with tensors of 16 MB and more outside them (command line only).

    By default every thread has a heap of its own and large blocks stay in it; with a single heap, threads wait for each other.
    Measured: peak of gptq on a Llama with hidden size 1024 0.79 GB by default, 0.78 with one, 0.76 with two; learned rounding
    of tiny-llama on two cores 47 s with one, 45 with two.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_ARENA_MAX, 2)
        mallopt(_MMAP_THRESHOLD, 16 << 20)


def give_back() -> None:
    """Return free heap memory to the system. Takes milliseconds."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def require_room_for_libraries() -> None:
    """Raises MemoryError where a limit of this process (ulimit -v) leaves no room to load numpy, whose OpenBLAS would end the
    process with a message of its own."""
    if sys.platform != "linux" or "numpy" in sys.modules:
        return
    limit = _limit()
    if limit is None:
        return
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    if limit - mapped < _LIBRARIES:
        raise MemoryError


def _limit() -> int | None:
    """Bytes that this process may map, of a limit (ulimit -v); None where there is none. For Linux."""
    import resource  # which Windows does not have

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out: a Python error, one of torch's allocators, or a failed load of a library.
    Under a limit the interpreter may have no room left for the error itself, and says just that none was set."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, SystemError):
        return sys.platform == "linux" and _limit() is not None and "without exception set" in str(error)
    return isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in _ALLOCATORS)
