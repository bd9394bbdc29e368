"""From runs of the packed model to a policy: what errors NVFP4 inputs make, and how they follow from a block's change.

The packed pipeline samples some prompts with inputs as they are. At every step each linear's output is also computed with NVFP4
inputs, on SAMPLE_TOKENS of its tokens, and the relative L1 error is paired with the change of its block one step earlier,
over all steps, branches and prompts (the paper: least squares on 100 prompts, section 5.1). Thresholds are then set so that
the mean width and the share of skips come out as asked on these very runs, told what the policy would have done there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qkit.diffusion.controller import Controller, Told
from qkit.diffusion.policy import MOST_SKIPS, NARROW, PURE, WARM_UP, Asked, Policy
from qkit.diffusion.schedule import LONGEST, best_groups, group_costs
from qkit.formats import ACTIVATION_FORMATS

SAMPLE_TOKENS = 256  # of a linear's inputs that errors are measured on
SAMPLE_VALUES = 1 << 14  # of a block's residual that a schedule goes by
PROMPTS = 8  # that runs are observed on, if there are as many


@dataclass(frozen=True)
class Seen:
    """One linear at one step. run: number of the prompt; change: of its block one step earlier (None: the first step)."""

    run: int
    step: int
    branch: int
    block: int
    linear: str
    change: float | None
    error: float


class Observer(Controller):
    """Lets everything run as it is, and looks."""

    watches = True

    def __init__(self) -> None:
        self.run, self.seen = -1, list[Seen]()
        self.residuals: dict[tuple[int, int, int], list[Tensor]] = defaultdict(list)
        self.drifts: dict[tuple[int, int, int], list[float | None]] = defaultdict(
            list
        )  # by run, branch, block: by step
        super().__init__(Policy({}, math.inf))

    def reset(self) -> None:
        """A new run begins."""
        super().reset()
        self.run += 1

    def choose(self, block: int, linear: Told, name: str, x: Tensor) -> str:
        """Note the error that NVFP4 inputs would make; inputs stay as they are."""
        flat = x.reshape(-1, x.shape[-1])
        some = flat[:: max(1, len(flat) // SAMPLE_TOKENS)]
        true, rounded = (linear.product(some, f).float() for f in (None, ACTIVATION_FORMATS[NARROW]))
        error = float((rounded - true).abs().sum() / true.abs().sum().clamp_min(1e-30))
        change = self.states[self.branch, block].change
        self.seen.append(Seen(self.run, self.step, self.branch, block, name, change, error))
        return PURE

    def ran(self, block: int, given: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        """Note how much the residual drifted, too."""
        super().ran(block, given, made)
        state, key = self.state(block, given), (self.run, self.branch, block)
        self.drifts[key].append(state.drift)
        flat = torch.cat([d.flatten() for d in state.deltas.values()])
        self.residuals[key].append(flat[:: max(1, len(flat) // SAMPLE_VALUES)].cpu().clone())


@dataclass(frozen=True)
class Fit:
    """A policy, and what is known of it. pearson: by linear, correlation of error and change (NaN where one is constant)."""

    policy: Policy
    pearson: dict[str, float]
    pairs: int
    expected: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For qkit.json and reports; a correlation that is not defined is null."""
        rounded = {n: None if math.isnan(r) else round(r, 4) for n, r in self.pearson.items()}
        return {"pearson": rounded, "pairs": self.pairs, "expected": self.expected}


def fit(seen: Observer, asked: Asked) -> Fit:
    """The policy that the observed runs ask for."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for s in seen.seen:
        if s.change is not None:
            pairs[s.linear].append((s.change, s.error))
    fits, pearson = {}, {}
    for name, xy in pairs.items():
        fits[name], pearson[name] = least_squares(torch.tensor(xy, dtype=torch.float64))
        if asked.kind == "static":
            fits[name] = 0.0, sum(y for _, y in xy) / len(xy)
    policy = Policy(fits, math.inf, most=MOST_SKIPS, kind=asked.kind)
    if asked.skips and asked.cache == "schedule":
        computed, steps = _schedule(seen, asked.skips)
        policy = replace(policy, computed=computed, steps=steps, purify=asked.purify)
        skipped = {key: [s not in computed for s in range(steps)] for key in seen.drifts}
    else:
        tau = _tau(seen, asked.skips) if asked.skips else 0.0
        policy = replace(policy, tau=tau, purify=asked.purify if tau else 0.0)
        skipped = {key: skips_of(drifts, tau) for key, drifts in seen.drifts.items()}
    policy = replace(policy, threshold=_threshold(seen, policy, skipped, asked.width))
    every = [x for xs in skipped.values() for x in xs]
    return Fit(policy, pearson, sum(map(len, pairs.values())), {"skips": round(sum(every) / max(1, len(every)), 4)})


def least_squares(xy: Tensor) -> tuple[tuple[float, float], float]:
    """((slope, offset), Pearson r) of y against x, from xy [n, 2]; slope 0 and NaN where x is constant."""
    x, y = xy.unbind(1)
    dx, dy = x - x.mean(), y - y.mean()
    power, other, both = float(dx.square().sum()), float(dy.square().sum()), float((dx * dy).sum())
    if power <= 1e-24:
        return (0.0, float(y.mean())), math.nan
    slope = both / power
    return (slope, float(y.mean() - slope * x.mean())), both / math.sqrt(power * other) if other > 1e-24 else math.nan


def skips_of(drifts: list[float | None], tau: float, most: int = MOST_SKIPS) -> list[bool]:
    """By step, whether the cache rule would have skipped a block with these drifts; drifts are those of full runs."""
    found, summed, in_a_row, last = [], 0.0, 0, None
    for step, drift in enumerate(drifts):
        if step >= WARM_UP and last is not None:
            summed += last
            if summed < tau and in_a_row < most:
                in_a_row += 1
                found.append(True)
                continue
        summed, in_a_row, last = 0.0, 0, drift
        found.append(False)
    return found


def _schedule(seen: Observer, share: float) -> tuple[tuple[int, ...], int]:
    """(steps that are computed, steps in all), so that no larger share is skipped."""
    features = list(seen.residuals.values())
    steps = len(features[0])
    costs = torch.stack([group_costs(torch.stack(f)) for f in features]).mean(0)
    groups = max(math.ceil(steps / LONGEST), steps - int(steps * share))
    return best_groups(costs, groups), steps


def _tau(seen: Observer, share: float) -> float:
    """The largest tau, to a thousandth of the largest sum, under which no larger share of block runs would be skipped."""
    every = list(seen.drifts.values())
    count = sum(map(len, every))
    low, high = 0.0, (MOST_SKIPS + 1) * max((d for ds in every for d in ds if d is not None), default=0.0)
    for _ in range(40):
        middle = (low + high) / 2
        total = sum(sum(skips_of(ds, middle)) for ds in every)
        low, high = (middle, high) if total <= share * count else (low, middle)
    return low


def _threshold(seen: Observer, policy: Policy, skipped: dict[tuple[int, int, int], list[bool]], width: float) -> float:
    """Below it lie as many predictions as may be NVFP4 for that mean width; runs that follow a skip are INT8."""
    predicted, count = [], 0
    for s in seen.seen:
        steps = skipped[s.run, s.branch, s.block]
        if steps[s.step]:
            continue
        count += 1
        after_skip = s.step > 0 and steps[s.step - 1]
        expected = policy.predicted(s.linear, None if after_skip else s.change)
        if expected is not None:
            predicted.append(expected)
    narrow = round(count * (8 - width) / 4)
    predicted.sort()
    if narrow <= 0:
        return -math.inf
    return math.inf if narrow >= len(predicted) else predicted[narrow - 1]
