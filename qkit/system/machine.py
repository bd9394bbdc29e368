"""Properties of this machine: cores, memory, and fast arithmetic."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch
from qkit_kernels import cores


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_bytes() -> int:
    """Peak resident memory of this process so far, in bytes (mostly libraries)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process in bytes, or its peak where the system gives no current value."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return process_bytes()


def machine_memory() -> int | None:
    """Bytes of memory of this machine; None where the system gives no value."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def available_memory() -> int | None:
    """Bytes of memory that this process can use, its current size included; None where the system gives no value."""
    try:
        pages = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in pages if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return machine_memory()
    return free + process_bytes()


def run_dtype(stored: torch.dtype, device: str = "cpu") -> torch.dtype:
    """The dtype in which blocks with weights in ``stored`` run: bfloat16 where the device multiplies it, else float32."""
    multiplies = torch.cuda.is_bf16_supported() if device.startswith("cuda") else cores.multiplies_bf16()
    return stored if stored == torch.bfloat16 and multiplies else torch.float32
