"""A profile and a budget -> which unit gets which candidate, and the recipe that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import ceil
from typing import Any, TypeVar

from qkit.allocation import knapsack
from qkit.allocation.latency import Latency
from qkit.allocation.limits import Budget
from qkit.errors import Unsupported, UsageError
from qkit.sensitivity.profile import Profile, UnitProfile

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """picks: {unit: candidate}; bytes: of the units; limit: what they may take, None: any number; cost: predicted, in the unit
    of ``measure``; gap: to the proven bound; time, time_limit: nanoseconds, where there is a latency budget."""

    picks: dict[str, str]
    bytes: int
    limit: int | None
    cost: float
    gap: float
    measure: str
    time: int | None = None
    time_limit: int | None = None


def limit_bytes(profile: Profile, budget: Budget, beside: int) -> int | None:
    """Bytes that the units may take; None: any number. beside: what else a size (headers of the files) or a memory (activations
    and KV cache at the budget's context) has to hold."""
    if budget.bits is not None:
        return int(budget.bits * sum(u.weights for u in profile.units) / 8)
    total = budget.memory if budget.size is None else budget.size
    return None if total is None else total - beside - profile.fixed_bytes


def bounded(
    profile: Profile, floors: Sequence[tuple[str, str]] = (), ceilings: Sequence[tuple[str, str]] = ()
) -> Profile:
    """The profile without the choices that the bounds exclude.

    floors, ceilings: (glob, candidate): units with a linear that matches get at least, at most the bytes of that candidate.
    Raises UsageError for an unknown candidate or glob, and where a unit has no choice left.
    """
    for option, bounds in (("--floor", floors), ("--ceiling", ceilings)):
        for glob, candidate in bounds:
            if candidate not in profile.candidates:
                raise UsageError(f"{option} {glob}={candidate}: the profile has {', '.join(profile.candidates)}")
            if not any(_matches(u, glob) for u in profile.units):
                raise UsageError(f"{option} {glob}: matches no layer of the profile")
    units = []
    for u in profile.units:
        least = max((u.choices[c].bytes for g, c in floors if _matches(u, g) and c in u.choices), default=0)
        most = min((u.choices[c].bytes for g, c in ceilings if _matches(u, g) and c in u.choices), default=None)
        open_ = {n: c for n, c in u.choices.items() if c.bytes >= least and (most is None or c.bytes <= most)}
        if not open_:
            raise UsageError(
                f"{u.linears[0]}: no format is left between its --floor and its --ceiling: change one of them"
            )
        units.append(replace(u, choices=open_))
    return replace(profile, units=tuple(units))


@dataclass(frozen=True)
class Reach:
    """What the choices of a profile come to, from the smallest everywhere to the largest everywhere, beside what a budget asks
    for: all three in bits of a weight (option --bits) or in bytes of the whole."""

    option: str
    asked: float
    least: float
    most: float

    def __str__(self) -> str:
        """A line for a person, of a budget that can be met."""
        bits = self.option == "--bits"
        asked, least, most = (
            f"{x:.3f} bits a weight" if bits else f"{x / 1e6:.2f} MB" for x in (self.asked, self.least, self.most)
        )
        beyond = ", and even the largest formats fit" if self.most <= self.asked else ""
        return f"{self.option} {asked} can be met: the formats to choose from reach {least} to {most}{beyond}"


def reach(profile: Profile, budget: Budget, beside: tuple[int, int]) -> Reach | None:
    """What the choices come to under a budget; None: it is of time alone. beside: at the least and at the most, as for
    ``limit_bytes``."""
    sizes = [[c.bytes for c in u.choices.values()] for u in profile.units]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    if budget.bits is not None:
        weights = sum(u.weights for u in profile.units)
        return Reach("--bits", budget.bits, 8 * least / weights, 8 * most / weights)
    asked = budget.memory if budget.size is None else budget.size
    if asked is None:
        return None
    low, high = (n + other + profile.fixed_bytes for n, other in zip((least, most), beside, strict=True))
    return Reach("--memory" if budget.size is None else "--size", asked, low, high)


def refuse_too_small(profile: Profile, budget: Budget, beside: int, floor: bool = False, measured: bool = True) -> None:
    """Raises Unsupported where the smallest choices are too large for the budget. floor: whether a --floor left some out;
    measured: whether the profile is there, or only what shapes say of it."""
    limit, found = limit_bytes(profile, budget, beside), reach(profile, budget, (beside, beside))
    least = sum(min(c.bytes for c in u.choices.values()) for u in profile.units)
    if limit is None or found is None or least <= limit:
        return
    if found.option == "--bits":
        given, needed = f"{found.asked:g}", f"{ceil(1000 * found.least) / 1000}"
    else:
        at = f"@{budget.context}" if found.option == "--memory" else ""
        given, needed = f"{found.asked / 1e6:.2f}MB{at}", f"{ceil(found.least / 1e4) / 100}MB{at}"
    lower = ", lower --floor" if floor else ""
    of = "formats of the profile" if measured else f"of {', '.join(profile.candidates)}"
    smaller = "profile smaller ones" if measured else "name smaller ones with --candidates"
    raise Unsupported(
        f"{found.option} {given}: the smallest {of} need {found.option} {needed}: raise the budget{lower} or {smaller}"
    )


def allocate(profile: Profile, limit: int | None, measure: str, latency: Latency | None = None) -> Allocation:
    """The plan of least predicted cost within ``limit`` bytes, the time of ``latency``, or both.

    Raises UsageError for an unknown measure, Unsupported for a time that nothing keeps.
    """
    if measure not in profile.measures:
        raise UsageError(f"--measure {measure}: the profile has {', '.join(profile.measures)}: profile again with it")
    limits = {} if limit is None else {"bytes": limit}
    limits |= {} if latency is None else {"nanoseconds": latency.limit}
    units = choices_of(profile, measure, latency)
    try:
        found = knapsack.solve(units, limits)
    except knapsack.Excluded as e:
        if e.resource != "nanoseconds" or latency is None:
            raise
        within = "" if limit is None else " within the budget of bytes"
        raise Unsupported(
            f"--latency {latency.limit / 1e6:.3f}ms: the fastest formats of the profile take {e.least / 1e6:.3f}ms{within}: "
            "raise one of the budgets, or profile faster formats"
        ) from e
    chosen = [unit[i] for unit, i in zip(units, found.picks, strict=True)]
    picks = {u.key: c.name for u, c in zip(profile.units, chosen, strict=True)}
    size = sum(c.uses["bytes"] for c in chosen)
    time, time_limit = (None, None) if latency is None else (found.used["nanoseconds"], latency.limit)
    return Allocation(
        picks=picks,
        bytes=size,
        limit=limit,
        cost=found.cost,
        gap=found.gap,
        measure=measure,
        time=time,
        time_limit=time_limit,
    )


def choices_of(profile: Profile, measure: str, latency: Latency | None) -> list[list[knapsack.Choice]]:
    """Every unit's choices for the knapsack; one that seems to gain by rounding costs nothing."""

    def choice(unit: UnitProfile, name: str) -> knapsack.Choice:
        size, cost = unit.choices[name].bytes, unit.choices[name].costs[measure]
        time = {} if latency is None else {"nanoseconds": latency.times[unit.key, name]}
        return knapsack.Choice(name, max(cost, 0.0), {"bytes": size, **time})

    return [[choice(u, name) for name in u.choices] for u in profile.units]


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
    return _beside(profile, picks, profile.request["outliers"])


def ranks(profile: Profile, picks: dict[str, str]) -> dict[str, int] | None:
    """{linear: rank of its low-rank part} of those that have one; None where no unit has."""
    return _beside(profile, picks, profile.request.get("ranks", {}))


def _beside(profile: Profile, picks: dict[str, str], of: Mapping[str, T]) -> dict[str, T] | None:
    """of: {candidate: what is beside its codes}"""
    return {n: of[name] for u in profile.units if of.get(name := picks[u.key]) for n in u.linears} or None
