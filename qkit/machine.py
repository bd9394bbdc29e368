"""What this machine has: cores, memory, and the arithmetic that its cores are fast at."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_bytes() -> int:
    """Resident memory of this process at its highest so far (the libraries, mostly)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not say, at its highest."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return process_bytes()


def available_memory() -> int | None:
    """Bytes that this process may still use, its present size included; None where the system does not say."""
    try:
        pages = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in pages if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (OSError, ValueError):
            return None
    return free + process_bytes()


def run_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype to run blocks in whose weights are stored in ``stored``: bfloat16 where the cores multiply it, else float32.

    A core without bf16 products is several times slower in bf16 than in float32 (measured with AVX2 alone: 10 against 75
    GFLOP/s a core), and float16 products are as rare.
    """
    fast = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if platform.machine() in ("arm64", "aarch64")
        else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return stored if stored == torch.bfloat16 and fast else torch.float32


def has_int8_products() -> bool:
    """Whether the cores multiply INT8 faster than float32. Without such instructions torch's integer product runs at 1 to 2
    GFLOP/s (measured with AVX2 alone, where float32 runs at 75)."""
    return platform.machine() in ("arm64", "aarch64") or bool(torch.cpu._is_vnni_supported())
