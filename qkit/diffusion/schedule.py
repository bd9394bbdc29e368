"""Schedules of computed and reused steps, by CacheQuant's dynamic programming (arXiv 2503.01323, DPS).

The steps of a sampler are cut into consecutive groups; a group is computed at its first step and reused at the others. The cut
with the least summed distance between what is reused and what would have been computed is exact by dynamic programming. The
paper takes one feature of a U-Net and the L1 distance; here it is the residual of every block, relative to its own mean (ours).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qkit.diffusion.policy import MOST_SKIPS

LONGEST = 1 + MOST_SKIPS  # steps of a group, at most


def group_costs(features: Tensor) -> Tensor:
    """Costs, float64 [T, T]: entry (j, n) is that of reusing step j until step n, n included; infinite below the diagonal.

    features: [T, values] of one block, relative to their mean absolute value
    """
    count = len(features)
    scale = features.abs().mean().clamp_min(1e-30).double()
    costs = torch.full((count, count), math.inf, dtype=torch.float64)
    for j in range(count):
        distances = (features[j:] - features[j]).abs().mean(1).double() / scale
        costs[j, j:] = distances.cumsum(0)
    return costs


def best_groups(costs: Tensor, groups: int, longest: int = LONGEST) -> tuple[int, ...]:
    """First steps of the ``groups`` consecutive groups of at most ``longest`` steps with the least summed cost.

    costs: as ``group_costs``. Raises ValueError where so few groups cannot hold all steps.
    """
    count = len(costs)
    if not math.ceil(count / longest) <= groups <= count:
        raise ValueError(f"{count} steps in {groups} groups of at most {longest}")
    best_cost = torch.full((groups + 1, count + 1), math.inf, dtype=torch.float64)  # of the first n steps in g groups
    start = torch.zeros(groups + 1, count + 1, dtype=torch.int64)
    best_cost[0, 0] = 0
    for g in range(1, groups + 1):
        for n in range(1, count + 1):
            for j in range(max(0, n - longest), n):
                cost = best_cost[g - 1, j] + costs[j, n - 1]
                if cost < best_cost[g, n]:
                    best_cost[g, n], start[g, n] = cost, j
    first_steps, n = [], count
    for g in range(groups, 0, -1):
        n = int(start[g, n])
        first_steps.append(n)
    return tuple(reversed(first_steps))
