"""A profile and a budget -> which unit gets which candidate, and the recipe that says so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from qkit.allocation import knapsack
from qkit.errors import UsageError
from qkit.sensitivity.profile import Profile, UnitProfile

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """bits: mean stored bits of a quantized weight, scales included; size: bytes of all tensors of the result; memory: bytes
    while running at ``context`` tokens. Exactly one of the three is given."""

    bits: float | None = None
    size: int | None = None
    memory: int | None = None
    context: int = 0


@dataclass(frozen=True)
class Allocation:
    """picks: {unit: candidate}; bytes: of the units; limit: what they may take; cost: predicted, in the unit of ``measure``;
    gap: to the proven bound."""

    picks: dict[str, str]
    bytes: int
    limit: int
    cost: float
    gap: float
    measure: str


def parse_budget(bits: float | None, size: str | None, memory: str | None) -> Budget | None:
    """The budget of the command line; None when there is none. Raises UsageError for two of them or what cannot be read."""
    given = [x for x in (bits, size, memory) if x is not None]
    if not given:
        return None
    if len(given) > 1:
        raise UsageError("--bits, --size and --memory exclude each other: give one budget")
    if bits is not None:
        if not 1 <= bits <= 32:
            raise UsageError(f"--bits {bits}: expected a number from 1 to 32, the mean bits of a weight")
        return Budget(bits=bits)
    if size is not None:
        return Budget(size=_bytes(size, "--size"))
    assert memory is not None
    amount, at, context = memory.partition("@")
    if not at or not context.isdigit():
        raise UsageError(f"--memory {memory}: expected an amount and a context length, for instance 6GB@32768")
    return Budget(memory=_bytes(amount, "--memory"), context=int(context))


def _bytes(text: str, option: str) -> int:
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS or found[1].count(".") > 1:
        raise UsageError(f"{option} {text}: expected a number with B, KB, MB, GB, MiB or GiB, for instance 90MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def limit_bytes(profile: Profile, budget: Budget, running_bytes: int) -> int:
    """Bytes that the units may take. running_bytes: of activations and KV cache at the budget's context."""
    if budget.bits is not None:
        return int(budget.bits * sum(u.weights for u in profile.units) / 8)
    total = budget.size if budget.size is not None else (budget.memory or 0) - running_bytes
    return total - profile.fixed_bytes


def allocate(
    profile: Profile,
    limit: int,
    measure: str,
    floors: Sequence[tuple[str, str]] = (),
    ceilings: Sequence[tuple[str, str]] = (),
) -> Allocation:
    """The plan of least predicted cost within ``limit`` bytes.

    floors, ceilings: (glob, candidate): units with a linear that matches get at least, at most the bytes of that candidate.
    Raises UsageError for an unknown measure or glob and for a budget that nothing fits.
    """
    if measure not in profile.measures:
        raise UsageError(f"--measure {measure}: the profile has {', '.join(profile.measures)}: profile again with it")
    for option, bounds in (("--floor", floors), ("--ceiling", ceilings)):
        for glob, candidate in bounds:
            if candidate not in profile.candidates:
                raise UsageError(f"{option} {glob}={candidate}: the profile has {', '.join(profile.candidates)}")
            if not any(_matches(u, glob) for u in profile.units):
                raise UsageError(f"{option} {glob}: matches no layer of the profile")
    units = [
        [
            knapsack.Choice(name, max(c.costs[measure], 0.0), {"bytes": c.bytes})
            for name, c in _open(u, floors, ceilings)
        ]
        for u in profile.units
    ]
    found = knapsack.solve(units, {"bytes": limit})
    picks = {u.key: unit[i].name for u, unit, i in zip(profile.units, units, found.picks, strict=True)}
    return Allocation(picks, found.used["bytes"], limit, found.cost, found.gap, measure)


def _open(unit: UnitProfile, floors: Sequence[tuple[str, str]], ceilings: Sequence[tuple[str, str]]) -> list[Any]:
    least = max((unit.choices[c].bytes for g, c in floors if _matches(unit, g) and c in unit.choices), default=0)
    most = min((unit.choices[c].bytes for g, c in ceilings if _matches(unit, g) and c in unit.choices), default=None)
    return [(n, c) for n, c in unit.choices.items() if c.bytes >= least and (most is None or c.bytes <= most)]


def _matches(unit: UnitProfile, glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in unit.linears)


def rules(profile: Profile, picks: dict[str, str]) -> list[dict[str, Any]]:
    """Recipe rules, one per candidate in use, that name the linears of each.

    A group size that the profile was made with applies to the schemes that have one.
    """
    found: list[dict[str, Any]] = []
    for candidate in profile.candidates:
        names = [n for u in profile.units if picks[u.key] == candidate for n in u.linears]
        if not names:
            continue
        if candidate == "keep":
            found.append({"match": names, "skip": "the budget allows it to stay as it is"})
            continue
        group = profile.request["group_sizes"][candidate]
        scheme = candidate.partition("+")[0]
        found.append({"match": names, "scheme": scheme, **({} if group is None else {"group_size": group})})
    return found


def outliers(profile: Profile, picks: dict[str, str]) -> dict[str, float] | None:
    """{linear: percent of its weights in a sparse part} of those that have one; None where no unit has."""
    share = profile.request["outliers"]
    return {n: share[picks[u.key]] for u in profile.units if share[picks[u.key]] for n in u.linears} or None
