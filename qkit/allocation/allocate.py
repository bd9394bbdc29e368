"""The allocation of a budget: a candidate for every unit, from a profile, and the recipe that states it."""

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
    """A format for every unit, with its bytes and its predicted cost.

    picks: {unit: candidate}; bytes: of the units; limit: the most bytes, None: any number; cost: predicted, in the unit of
    ``measure``; gap: to the proven bound; time, time_limit: nanoseconds, where there is a latency budget.
    """

    picks: dict[str, str]
    bytes: int
    limit: int | None
    cost: float
    gap: float
    measure: str
    time: int | None = None
    time_limit: int | None = None


def limit_bytes(profile: Profile, budget: Budget, other_bytes: int) -> int | None:
    """The bytes that the units may use; None: any number. other_bytes: the bytes of everything else that a size (headers of the
    files) or a memory (activations and KV cache at the budget's context) has to hold."""
    if budget.bits is not None:
        return int(budget.bits * sum(u.weights for u in profile.units) / 8)
    total = budget.memory if budget.size is None else budget.size
    return None if total is None else total - other_bytes - profile.fixed_bytes


def apply_bounds(
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
        smallest = max((u.choices[c].bytes for g, c in floors if _matches(u, g) and c in u.choices), default=0)
        largest = min((u.choices[c].bytes for g, c in ceilings if _matches(u, g) and c in u.choices), default=None)
        allowed = {
            n: c for n, c in u.choices.items() if c.bytes >= smallest and (largest is None or c.bytes <= largest)
        }
        if not allowed:
            raise UsageError(
                f"{u.linears[0]}: no format is left between its --floor and its --ceiling: change one of them"
            )
        units.append(replace(u, choices=allowed))
    return replace(profile, units=tuple(units))


@dataclass(frozen=True)
class Reach:
    """The range of sizes that the choices of a profile reach, beside the budget: all three in bits of a weight (option
    --bits) or in bytes of the whole."""

    option: str
    asked: float
    least: float
    most: float

    def __str__(self) -> str:
        """A line for a person, of a budget that can be met."""
        bits = self.option == "--bits"
        budget, smallest, largest = (
            f"{x:.3f} bits a weight" if bits else f"{x / 1e6:.2f} MB" for x in (self.asked, self.least, self.most)
        )
        note = ", and even the largest formats fit" if self.most <= self.asked else ""
        return f"{self.option} {budget} can be met: the formats to choose from reach {smallest} to {largest}{note}"


def reach(profile: Profile, budget: Budget, other_bytes: tuple[int, int]) -> Reach | None:
    """The range of sizes beside a budget; None for a budget of time alone. other_bytes: bytes at the least and at the most,
    as for ``limit_bytes``."""
    sizes = [[c.bytes for c in u.choices.values()] for u in profile.units]
    smallest, largest = sum(map(min, sizes)), sum(map(max, sizes))
    if budget.bits is not None:
        weights = sum(u.weights for u in profile.units)
        return Reach("--bits", budget.bits, 8 * smallest / weights, 8 * largest / weights)
    budget_bytes = budget.memory if budget.size is None else budget.size
    if budget_bytes is None:
        return None
    low, high = (n + extra + profile.fixed_bytes for n, extra in zip((smallest, largest), other_bytes, strict=True))
    return Reach("--memory" if budget.size is None else "--size", budget_bytes, low, high)


def refuse_too_small(
    profile: Profile, budget: Budget, other_bytes: int, floor: bool = False, measured: bool = True
) -> None:
    """Raises Unsupported where the smallest choices are too large for the budget. floor: whether a --floor excluded some;
    measured: whether the profile is there, or only what shapes say of it."""
    limit, reached = limit_bytes(profile, budget, other_bytes), reach(profile, budget, (other_bytes, other_bytes))
    smallest = sum(min(c.bytes for c in u.choices.values()) for u in profile.units)
    if limit is None or reached is None or smallest <= limit:
        return
    if reached.option == "--bits":
        stated_budget, needed = f"{reached.asked:g}", f"{ceil(1000 * reached.least) / 1000}"
    else:
        at = f"@{budget.context}" if reached.option == "--memory" else ""
        stated_budget, needed = f"{reached.asked / 1e6:.2f}MB{at}", f"{ceil(reached.least / 1e4) / 100}MB{at}"
    lower = ", lower --floor" if floor else ""
    formats = "formats of the profile" if measured else f"of {', '.join(profile.candidates)}"
    smaller = "profile smaller ones" if measured else "name smaller ones with --candidates"
    raise Unsupported(
        f"{reached.option} {stated_budget}: the smallest {formats} need {reached.option} {needed}: "
        f"raise the budget{lower} or {smaller}"
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
        solution = knapsack.solve(units, limits)
    except knapsack.Infeasible as e:
        if e.resource != "nanoseconds" or latency is None:
            raise
        within = "" if limit is None else " within the budget of bytes"
        raise Unsupported(
            f"--latency {latency.limit / 1e6:.3f}ms: the fastest formats of the profile take {e.least / 1e6:.3f}ms{within}: "
            "raise one of the budgets, or profile faster formats"
        ) from e
    chosen = [unit[i] for unit, i in zip(units, solution.picks, strict=True)]
    picks = {u.key: c.name for u, c in zip(profile.units, chosen, strict=True)}
    size = sum(c.uses["bytes"] for c in chosen)
    time, time_limit = (None, None) if latency is None else (solution.used["nanoseconds"], latency.limit)
    return Allocation(
        picks=picks,
        bytes=size,
        limit=limit,
        cost=solution.cost,
        gap=solution.gap,
        measure=measure,
        time=time,
        time_limit=time_limit,
    )


def choices_of(profile: Profile, measure: str, latency: Latency | None) -> list[list[knapsack.Choice]]:
    """The choices of every unit for the knapsack; one that seems to gain by rounding costs nothing."""

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
    recipe_rules: list[dict[str, Any]] = []
    for candidate in profile.candidates:
        names = [n for u in profile.units if picks[u.key] == candidate for n in u.linears]
        if not names:
            continue
        if candidate == "keep":
            recipe_rules.append({"match": names, "skip": "the budget allows it to stay as it is"})
            continue
        group = profile.request["group_sizes"][candidate]
        scheme = candidate.partition("+")[0]
        recipe_rules.append({"match": names, "scheme": scheme, **({} if group is None else {"group_size": group})})
    return recipe_rules


def outliers(profile: Profile, picks: dict[str, str]) -> dict[str, float] | None:
    """The percent of weights in a sparse part, {linear: percent}, of those that have one; None where no unit has."""
    return _by_linear(profile, picks, profile.request["outliers"])


def ranks(profile: Profile, picks: dict[str, str]) -> dict[str, int] | None:
    """The rank of the low-rank part, {linear: rank}, of those that have one; None where no unit has."""
    return _by_linear(profile, picks, profile.request.get("ranks", {}))


def _by_linear(profile: Profile, picks: dict[str, str], of: Mapping[str, T]) -> dict[str, T] | None:
    """of: {candidate: what is beside its codes}"""
    return {n: of[name] for u in profile.units if of.get(name := picks[u.key]) for n in u.linears} or None
