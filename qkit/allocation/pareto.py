"""Predicted cost against bytes: exact allocations over the whole range of budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qkit.allocation.allocate import allocate
from qkit.sensitivity.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Point:
    """The plan of least predicted cost within ``limit`` bytes.

    bytes: of the units; bits: the same per weight; cost: predicted, in the measure's unit; picks: {unit: candidate};
    measured: KL divergence of the whole plan from the original in nats a token, None where it was not measured
    """

    limit: int
    bytes: int
    bits: float
    cost: float
    picks: dict[str, str]
    measured: float | None


def curve(profile: Profile, measure: str, points: int = 40) -> list[Point]:
    """Exact solutions at ``points`` (2 or more) budgets, evenly from the smallest to the largest bytes of the units.

    In order of bytes; costs fall strictly. A solution that another one beats in both is left out: a budget that buys
    nothing, and ties that the solver broke towards more bytes.
    """
    smallest = sum(min(c.bytes for c in u.choices.values()) for u in profile.units)
    largest = sum(max(c.bytes for c in u.choices.values()) for u in profile.units)
    limits = sorted({smallest + (largest - smallest) * i // (points - 1) for i in range(points)})
    solved = [(limit, allocate(profile, limit, measure)) for limit in limits]
    points_kept: list[Point] = []
    for limit, a in sorted(solved, key=lambda pair: (pair[1].bytes, pair[1].cost, pair[0])):
        if not points_kept or a.cost < points_kept[-1].cost:
            points_kept.append(
                Point(
                    limit=limit,
                    bytes=a.bytes,
                    bits=mean_bits(profile, a.bytes),
                    cost=a.cost,
                    picks=a.picks,
                    measured=None,
                )
            )
    return points_kept


def spread(count: int, limit: int) -> list[int]:
    """Indices of at most ``limit`` of ``count`` things, evenly and with both ends; of one, the middle."""
    if limit <= 1:
        return [count // 2] * min(limit, count)
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)}) if count > limit else [*range(count)]


def measure_points(
    points: list[Point], measured_count: int, measure: Callable[[dict[str, str]], float], step: Callable[[], None]
) -> list[Point]:
    """The curve with ``measured_count`` of its points measured, spread along it. measure: picks -> KL; step: after each."""
    curve_points = list(points)
    for i in spread(len(points), measured_count):
        curve_points[i] = replace(points[i], measured=measure(points[i].picks))
        step()
    return curve_points


def mean_bits(profile: Profile, size: int) -> float:
    """The mean bits of a weight when all units together have ``size`` bytes."""
    return 8 * size / sum(u.weights for u in profile.units)


def cost_of(profile: Profile, picks: dict[str, str], measure: str) -> float:
    """Predicted cost of a plan as the curve counts it: a unit that seems to gain by rounding costs nothing."""
    return sum(max(u.choices[picks[u.key]].costs[measure], 0.0) for u in profile.units)


def uniform(profile: Profile, measure: str) -> dict[str, tuple[float, float]]:
    """The bits and the cost of all units at one candidate, {candidate: (bits, cost)}, for those that every unit can get."""
    costs = {}
    for name in profile.candidates:
        if all(name in u.choices for u in profile.units):
            picks = {u.key: name for u in profile.units}
            size = sum(u.choices[name].bytes for u in profile.units)
            costs[name] = (mean_bits(profile, size), cost_of(profile, picks, measure))
    return costs
