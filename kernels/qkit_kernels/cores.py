"""What kind of core torch's CPU operators run on, and what arithmetic it is fast at. The one home of that knowledge."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

KINDS = ("amx", "avx512_bf16", "avx512", "avx2", "arm_bf16", "arm", "other")


def _arm() -> bool:
    return platform.machine() in ("arm64", "aarch64")


def kind() -> str:
    """One of KINDS: what decides which of torch's code paths run."""
    if _arm():
        return "arm_bf16" if multiplies_bf16() else "arm"
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    found = torch.backends.cpu.get_cpu_capability().lower()
    return found if found in KINDS else "other"


def name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def multiplies_bf16() -> bool:
    """Whether the cores multiply bfloat16. One without is several times slower in bf16 than in float32 (measured with AVX2
    alone: 10 against 75 GFLOP/s a core), and float16 products are as rare."""
    if _arm():
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def multiplies_int8() -> bool:
    """Whether the cores multiply INT8 faster than float32. Without such instructions torch's integer product runs at 1 to 2
    GFLOP/s (measured with AVX2 alone, where float32 runs at 75)."""
    return _arm() or bool(torch.cpu._is_vnni_supported())
