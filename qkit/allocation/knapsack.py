"""Exact multiple-choice knapsack: one choice for every unit, least total cost, within limits.

  minimize  sum_u c[u, x_u]   subject to   sum_u r_k[u, x_u] <= limit_k  for every resource k

solved as a 0/1 program by HiGHS (Huangfu and Hall, 2018) through SciPy, which proves optimality by branch and bound: the
gap between the solution and the best bound is part of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qkit.errors import NumericFailure, UsageError
from qkit.system.extras import needs


@dataclass(frozen=True)
class Choice:
    """One way to store a unit: its cost, and its use of each resource (bytes, nanoseconds, ..)."""

    name: str
    cost: float
    uses: Mapping[str, int]


@dataclass(frozen=True)
class Solution:
    """The solution of a knapsack. picks: the index of the choice of every unit; cost and used: their sums; gap: cost over
    its proven lower bound, less 1"""

    picks: tuple[int, ...]
    cost: float
    used: dict[str, int]
    gap: float

    def used_of(self, units: Sequence[Sequence[Choice]], resource: str) -> int:
        """The sum of a resource that was not limited."""
        return sum(unit[i].uses[resource] for unit, i in zip(units, self.picks, strict=True))


class Infeasible(UsageError):
    """The error for limits that no choice keeps together. resource: the last of them; least: the smallest amount of it
    within the others."""

    def __init__(self, message: str, resource: str, needed: int) -> None:
        super().__init__(message)
        self.resource, self.least = resource, needed


def solve(units: Sequence[Sequence[Choice]], limits: Mapping[str, int]) -> Solution:
    """The cheapest choice for every unit within the limits.

    Raises UsageError when even the smallest choices do not fit (saying what would), Excluded when they fit every limit but not
    all together, NumericFailure for costs that are not finite.
    """
    if not all(units):
        raise UsageError(
            "a unit without choices cannot be allocated: widen --candidates or the rules that exclude them"
        )
    for name, limit in limits.items():
        smallest = sum(min(c.uses[name] for c in unit) for unit in units)
        if smallest > limit:
            raise Infeasible(
                f"budget of {limit} {name}: the least of every layer together is {smallest}: raise the budget, or add other "
                "formats to --candidates",
                name,
                smallest,
            )
    costs = np.array([c.cost for unit in units for c in unit])
    if not np.isfinite(costs).all():
        raise NumericFailure("a cost of the profile is not finite: profile again, or use another --measure")
    refused: list[tuple[int, ...]] = []
    while True:
        picks, gap = _milp(units, costs, limits, refused)
        used = {k: sum(unit[i].uses[k] for unit, i in zip(units, picks, strict=True)) for k in limits}
        if all(used[k] <= limits[k] for k in limits):
            chosen = [unit[i].cost for unit, i in zip(units, picks, strict=True)]
            return Solution(picks, math.fsum(chosen), used, gap)
        refused.append(
            picks
        )  # the solver works in floating point and may pass a limit by its tolerance: not these, then


def _milp(
    units: Sequence[Sequence[Choice]],
    costs: np.ndarray,
    limits: Mapping[str, int],
    refused: Sequence[tuple[int, ...]],
) -> tuple[tuple[int, ...], float]:
    """(choice of every unit, gap). refused: combinations that must not come out."""
    with needs("choosing formats for a budget", "allocation"):
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

    counts = [len(unit) for unit in units]
    starts = np.concatenate([[0], np.cumsum(counts)])
    total = int(starts[-1])
    owner = np.repeat(np.arange(len(units)), counts)
    one_each = csr_array((np.ones(total), (owner, np.arange(total))), shape=(len(units), total))
    constraints = [LinearConstraint(one_each, 1, 1)]
    upper = np.ones(total)
    for name, limit in limits.items():
        # Above the least of each unit and relative to the room there is: what the solver's tolerance is then relative to.
        smallest = [min(c.uses[name] for c in unit) for unit in units]
        room = limit - sum(smallest)
        above = np.array([c.uses[name] - m for unit, m in zip(units, smallest, strict=True) for c in unit], dtype=float)
        upper[above > room] = 0
        constraints.append(LinearConstraint((above / max(room, 1))[None], -np.inf, 1.0))
    for picks in refused:
        row = np.zeros((1, total))
        row[0, starts[:-1] + np.array(picks)] = 1
        constraints.append(LinearConstraint(row, -np.inf, len(units) - 1))
    result = milp(
        costs / max(float(np.abs(costs).max()), 1e-300),
        constraints=constraints,
        integrality=np.ones(total),
        bounds=Bounds(0, upper),
        options={"mip_rel_gap": 0.0, "time_limit": 60.0},
    )
    if result.x is None and result.status == 2 and len(limits) > 1 and not refused:
        *other_limits, last = limits
        by_last = [[Choice(c.name, float(c.uses[last]), c.uses) for c in unit] for unit in units]
        smallest_total = solve(by_last, {k: limits[k] for k in other_limits}).used_of(by_last, last)
        raise Infeasible(
            f"budgets of {', '.join(f'{v} {k}' for k, v in limits.items())}: within the others {last} are at least "
            f"{smallest_total}: raise one of them",
            last,
            smallest_total,
        )
    if result.x is None:
        raise NumericFailure(f"the allocation was not solved: {result.message}: raise the budget a little")
    picks = tuple(int(np.argmax(result.x[a:b])) for a, b in pairwise(starts))
    return picks, float(result.mip_gap or 0.0)
