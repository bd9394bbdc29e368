"""A search among whole plans, by measuring: costs of single layers do not add up at low bits, so it starts from the solved
plan.

Two steps, within a stated number of evaluations (our choice throughout):
 1. the exact solutions under every measure of the profile are measured; the best is where the search starts;
 2. swaps: one unit moves up and another one down, such that bytes and time still fit, those with the best predicted effect
    first; a swap is kept if the measured divergence falls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qkit.allocation.allocate import Allocation
from qkit.allocation.latency import Latency
from qkit.sensitivity.profile import Profile

Picks = dict[str, str]
MeasurePlan = Callable[[Picks], float]  # KL divergence of a whole plan, in nats a token


@dataclass(frozen=True)
class Refinement:
    """The result of a search near the solved plan.

    start, end: measured divergence of the first plan and of the best; history: (what was tried, measured, whether it was
    kept) of every plan that was measured.
    """

    picks: Picks
    start: float
    end: float
    history: tuple[tuple[str, float, bool], ...]


def refine(
    profile: Profile,
    starts: list[Allocation],
    measure_plan: MeasurePlan,
    evaluations: int,
    latency: Latency | None = None,
) -> Refinement:
    """The best plan found. starts: solutions under one budget, by measure; the first names the measure that ranks swaps."""
    limit, measure = starts[0].limit, starts[0].measure
    history: list[tuple[str, float, bool]] = []
    divergences: dict[tuple[str, ...], float] = {}

    def value(picks: Picks) -> float:
        key = tuple(picks[u.key] for u in profile.units)
        if key not in divergences:
            divergences[key] = measure_plan(picks)
        return divergences[key]

    best, best_value = starts[0].picks, float("inf")
    for start in starts:
        if len(divergences) >= evaluations:
            break
        before = len(divergences)
        divergence = value(start.picks)
        if len(divergences) > before:
            history.append((f"solved by {start.measure}", divergence, divergence < best_value))
        if divergence < best_value:
            best, best_value = start.picks, divergence
    first = value(starts[0].picks)
    refused: set[tuple[str, ...]] = set()
    while len(divergences) < evaluations:
        swap = next((s for s in _swaps(profile, best, limit, latency, measure) if _key(s) not in refused), None)
        if swap is None:
            break
        picks = {**best, **swap}
        before = len(divergences)
        divergence = value(picks)
        improved = divergence < best_value
        if len(divergences) > before:
            history.append((", ".join(f"{k} {best[k]} to {v}" for k, v in swap.items()), divergence, improved))
        if improved:
            best, best_value = picks, divergence
        else:
            refused.add(_key(swap))
    return Refinement(best, first, best_value, tuple(history))


def _key(swap: Picks) -> tuple[str, ...]:
    return tuple(sorted(f"{k}={v}" for k, v in swap.items()))


def _swaps(profile: Profile, picks: Picks, limit: int | None, latency: Latency | None, measure: str) -> Iterator[Picks]:
    """Changes of one or two units that fit the limits, the best predicted first."""
    room = [] if limit is None else [limit - sum(u.choices[picks[u.key]].bytes for u in profile.units)]
    room += [] if latency is None else [latency.limit - latency.of(picks)]

    def increase_of(key: str, name: str, size: int) -> list[int]:
        """The increase of each limited resource by a change."""
        time = [] if latency is None else [latency.times[key, name] - latency.times[key, picks[key]]]
        return ([] if limit is None else [size]) + time

    moves = []  # (unit, candidate, more of each resource, predicted cost more)
    for u in profile.units:
        current = u.choices[picks[u.key]]
        for name, choice in u.choices.items():
            if name != picks[u.key]:
                increase = increase_of(u.key, name, choice.bytes - current.bytes)
                moves.append((u.key, name, increase, choice.costs[measure] - current.costs[measure]))
    ups = [m for m in moves if any(x > 0 for x in m[2])]
    downs = [m for m in moves if any(x < 0 for x in m[2])]
    swaps = [(cost, {key: name}) for key, name, increase, cost in ups if _fits(increase, room)]
    for up in ups:
        for down in downs:
            if up[0] != down[0] and _fits([a + b for a, b in zip(up[2], down[2], strict=True)], room):
                swaps.append((up[3] + down[3], {up[0]: up[1], down[0]: down[1]}))
    swaps.sort(key=lambda item: item[0])
    return (swap for _, swap in swaps)


def _fits(increase: list[int], room: list[int]) -> bool:
    return all(t <= r for t, r in zip(increase, room, strict=True))
