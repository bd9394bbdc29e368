"""The limits of an allocation (bits, bytes, time), as the command line states them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qkit.errors import UsageError
from qkit.kvcache.policy import CacheRequest

CANDIDATES = "int2,int3,int4,int8"  # of a profile that a budget makes first, unless others are named
MEASURE = "auto"  # of the profile, that a budget makes small: the best one that was measured, or is cheap enough
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}


@dataclass(frozen=True)
class Budget:
    """The limits of an allocation.

    bits: mean stored bits of a quantized weight, scales included; size: bytes of the result's weight files; memory: bytes
    while running at ``context`` tokens; at most one of the three is given. latency: nanoseconds, and the file of the table
    that they are counted with; beside one of the three, or alone.
    """

    bits: float | None = None
    size: int | None = None
    memory: int | None = None
    context: int = 0
    latency: tuple[int, Path] | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetRequest:
    """The budget of ``qkit quantize``, with the profile and the search that it uses.

    floors, ceilings: (glob, candidate); evaluations: of whole plans, 0 for the solved plan as it is; candidates: of a
    profile that is still to be made, None: ``default``; named: whether the user said where the profile is; cache: the KV
    cache that a memory budget is shared with.
    """

    budget: Budget
    profile: Path
    candidates: str | None = None
    default: str = CANDIDATES
    measure: str = MEASURE
    floors: tuple[tuple[str, str], ...] = ()
    ceilings: tuple[tuple[str, str], ...] = ()
    evaluations: int = 0
    named: bool = False
    cache: CacheRequest | None = None


def parse_budget(bits: float | None, size: str | None, memory: str | None, latency: str | None = None) -> Budget | None:
    """The budget of the command line; None when there is none. Raises UsageError for two limits of bytes or what cannot be
    read."""
    byte_limits = [x for x in (bits, size, memory) if x is not None]
    time = None if latency is None else parse_latency(latency)
    if not byte_limits:
        return None if time is None else Budget(latency=time)
    if len(byte_limits) > 1:
        raise UsageError("--bits, --size and --memory exclude each other: use one of them")
    if bits is not None:
        if not 1 <= bits <= 32:
            raise UsageError(f"--bits {bits}: expected a number from 1 to 32, the mean bits of a weight")
        return Budget(bits=bits, latency=time)
    if size is not None:
        return Budget(size=parse_bytes(size, "--size"), latency=time)
    assert memory is not None
    amount, at, context = memory.partition("@")
    if not at or not context.isdigit():
        raise UsageError(f"--memory {memory}: expected an amount and a context length, for instance 6GB@32768")
    return Budget(memory=parse_bytes(amount, "--memory"), context=int(context), latency=time)


def parse_bytes(text: str, option: str) -> int:
    """The number of bytes of a text: '90MB' -> 90_000_000. Raises UsageError naming the option."""
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or match[1].count(".") > 1:
        raise UsageError(f"{option} {text}: expected a number with B, KB, MB, GB, MiB or GiB, for instance 90MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_latency(text: str) -> tuple[int, Path]:
    """The nanoseconds and the file of '12ms@table.json'. Raises UsageError."""
    amount, at, file = text.partition("@")
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ns|us|ms|s)", amount.strip().lower())
    if not at or not file or not match or not float(match[1]):
        raise UsageError(
            f"--latency {text}: expected a time and a table of 'qkit bench gemv --table', for instance 12ms@table.json"
        )
    return int(float(match[1]) * _TIMES[match[2]]), Path(file)
