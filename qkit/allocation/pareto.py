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


def curve(made: Profile, measure: str, points: int = 40) -> list[Point]:
    """Exact solutions at ``points`` (2 or more) budgets, evenly from the smallest to the largest bytes of the units.

    In order of bytes; costs fall strictly. A solution that another one beats in both is left out: a budget that buys
    nothing, and ties that the solver broke towards more bytes.
    """
    least = sum(min(c.bytes for c in u.choices.values()) for u in made.units)
    most = sum(max(c.bytes for c in u.choices.values()) for u in made.units)
    limits = sorted({least + (most - least) * i // (points - 1) for i in range(points)})
    solved = [(limit, allocate(made, limit, measure)) for limit in limits]
    found: list[Point] = []
    for limit, a in sorted(solved, key=lambda pair: (pair[1].bytes, pair[1].cost, pair[0])):
        if not found or a.cost < found[-1].cost:
            found.append(
                Point(
                    limit=limit, bytes=a.bytes, bits=mean_bits(made, a.bytes), cost=a.cost, picks=a.picks, measured=None
                )
            )
    return found


def spread(count: int, wanted: int) -> list[int]:
    """Indices of at most ``wanted`` of ``count`` things, evenly and with both ends; of one, the middle."""
    if wanted <= 1:
        return [count // 2] * min(wanted, count)
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)}) if count > wanted else [*range(count)]


def measure_points(
    points: list[Point], wanted: int, measured: Callable[[dict[str, str]], float], step: Callable[[], None]
) -> list[Point]:
    """The curve with ``wanted`` of its points measured, spread along it. measured: picks -> KL; step: after each."""
    found = list(points)
    for i in spread(len(points), wanted):
        found[i] = replace(points[i], measured=measured(points[i].picks))
        step()
    return found


def mean_bits(made: Profile, size: int) -> float:
    """Bits of a weight when all units together take ``size`` bytes."""
    return 8 * size / sum(u.weights for u in made.units)


def cost_of(made: Profile, picks: dict[str, str], measure: str) -> float:
    """Predicted cost of a plan as the curve counts it: a unit that seems to gain by rounding costs nothing."""
    return sum(max(u.choices[picks[u.key]].costs[measure], 0.0) for u in made.units)


def uniform(made: Profile, measure: str) -> dict[str, tuple[float, float]]:
    """{candidate: (bits, cost)} of all units at one candidate, for those that every unit can get."""
    found = {}
    for name in made.candidates:
        if all(name in u.choices for u in made.units):
            picks = {u.key: name for u in made.units}
            size = sum(u.choices[name].bytes for u in made.units)
            found[name] = (mean_bits(made, size), cost_of(made, picks, measure))
    return found
