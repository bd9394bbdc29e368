"""The machine of a benchmark: its kind, the speed of its memory, and the times that it cannot reach."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from qkit_kernels import cores
from torch import Tensor

from qkit.system.machine import available_cores, available_memory
from qkit.system.timing import fastest_run

TIMES_CACHE = 3  # cold: what was read in between is that many times the last-level cache
_ASSUMED_CACHE = 64 << 20
_TOLERANCE = 1.05  # bandwidth is measured too: a result may be that far above it
_WIDEST = 64  # operations of the narrowest arithmetic (INT8, AMX) in the time of one float32 operation
_PACKAGES = ("qkit", "torch", "transformers", "onnxruntime", "auto-round-lib", "triton")


@dataclass(frozen=True)
class Host:
    """The speed of a machine's memory and arithmetic.

    copy, read: bytes a second of memory that is not in a cache (a copy counts both ways); flops: float32 operations a
    second; cache: bytes of the last-level cache; buffer: float32, TIMES_CACHE times as large.
    """

    copy: float
    read: float
    flops: float
    cache: int
    buffer: Tensor

    @property
    def bandwidth(self) -> float:
        """Bytes a second: the better of both."""
        return max(self.copy, self.read)

    def floor(self, size: int) -> float:
        """The least seconds that moving ``size`` bytes takes."""
        return size / self.bandwidth

    def flush(self) -> None:
        """Reads so much that nothing else is left in the caches."""
        self.buffer.sum()

    def remeasure(self) -> Host:
        """The better of this and another measurement: something else may have been at the memory before."""
        again = measure_host(self.cache)
        best_of = {name: max(getattr(self, name), getattr(again, name)) for name in ("copy", "read", "flops")}
        return replace(self, **best_of)

    def refusal(self, seconds: float, size: int, operations: int) -> str | None:
        """The reason why a time cannot be true; None where it can. size: bytes that were moved from memory, 0 for what is
        in a cache."""
        if seconds <= 0:
            return "took no time at all"
        if seconds * self.bandwidth * _TOLERANCE < size:
            return (
                f"above the physical limit: {size:,} bytes in {seconds * 1e6:.1f} us are {size / seconds / 1e9:.1f} GB/s, and "
                f"the memory gives {self.bandwidth / 1e9:.1f}"
            )
        if seconds * self.flops * _WIDEST < operations:
            return (
                f"above the physical limit: {operations:,} operations in {seconds * 1e6:.1f} us are more than {_WIDEST} times "
                "what the cores do in float32"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """The measured figures as a JSON-able dictionary: bytes and operations a second, bytes of the cache."""
        return {"copy": self.copy, "read": self.read, "flops": self.flops, "cache": self.cache}


def cache_bytes() -> int:
    """Bytes of the largest cache of the first core; 64 MiB where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 0) if text else 0)
    return max(sizes) or _ASSUMED_CACHE


def measure_host(cache: int | None = None) -> Host:
    """The measured memory and arithmetic of this machine; the best of some runs counts. cache: bytes, in place of what the
    system says."""
    cache = cache or cache_bytes()
    largest_buffer = (available_memory() or 4 << 30) // 8
    buffer = torch.ones(max(1 << 16, min(TIMES_CACHE * cache, largest_buffer) // 4 // 4096 * 4096))
    target, matrix, vector = torch.empty_like(buffer), buffer.view(-1, 4096), torch.ones(4096)
    square = torch.ones(512, 512)
    with torch.inference_mode():
        copy = 2 * buffer.nbytes / fastest_run(lambda: target.copy_(buffer))
        read = buffer.nbytes / min(fastest_run(buffer.sum), fastest_run(lambda: torch.mv(matrix, vector)))
        flops = 2 * math.prod((512, 512, 512)) / fastest_run(lambda: torch.mm(square, square))
    return Host(copy, read, flops, cache, buffer)


def describe_host() -> dict[str, Any]:
    """The machine, the versions in use, and what else it is doing."""
    return {
        "processor": cores.name(),
        "kind": cores.kind(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory": available_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: installed for name in _PACKAGES if (installed := _version(name)) is not None},
        "clock_mhz": clock_mhz(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clock_mhz() -> float | None:
    """The clock of the first core as the system tells it; it is read, never set."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq").read_text()) / 1000
    except (OSError, ValueError):
        pass
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return float(next(line.partition(":")[2] for line in lines if line.startswith("cpu MHz")))
    except (OSError, StopIteration, ValueError):
        return None
