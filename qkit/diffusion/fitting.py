"""Fits a policy to runs of the packed model: errors of NVFP4 inputs as a function of a block's change.

The packed pipeline samples some prompts with unquantized inputs. At every step each linear's output is also computed with NVFP4
inputs, on SAMPLE_TOKENS of its tokens. Least squares relate the relative L1 error to the change of the block one step earlier,
over all steps, branches and prompts (the paper uses 100 prompts, section 5.1). Thresholds are then set so that the policy would
have the requested mean width and share of skips on these runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qkit.diffusion.controller import Controller, StepQuantizable
from qkit.diffusion.policy import BITS, MOST_SKIPS, NARROW, PURE, WARM_UP, WIDE, PolicyConfig, StepPolicy
from qkit.diffusion.schedule import LONGEST, best_groups, group_costs
from qkit.tensor.formats import ACTIVATION_FORMATS

SAMPLE_TOKENS = 256  # of a linear's inputs that errors are measured on
SAMPLE_VALUES = 1 << 14  # of a block's residual that a schedule goes by
PROMPTS = 8  # prompts of observed runs, if there are as many


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One linear at one step.

    run:    number of the prompt
    change: of its block one step earlier (None: it did not run then)
    error:  relative L1 of its output with NVFP4 inputs; peak: max |x| / mean |x| of its inputs; time: of the step
    """

    run: int
    step: int
    branch: int
    block: int
    linear: str
    change: float | None
    error: float
    peak: float = 0.0
    time: float = 0.0


class Observer(Controller):
    """A controller that observes errors, and changes nothing."""

    watches = True

    def __init__(self) -> None:
        self.run, self.observations = -1, list[Observation]()
        # By run, branch and block, and by step: values of the residual.
        self.residuals: dict[tuple[int, int, int], dict[int, Tensor]] = defaultdict(dict)
        super().__init__(StepPolicy(fits={}, threshold=math.inf))

    def reset(self) -> None:
        """A new run begins."""
        super().reset()
        self.run += 1

    def choose(self, block: int, linear: StepQuantizable, name: str, x: Tensor) -> str:
        """Record the error of NVFP4 inputs; the format is PURE, so inputs are not quantized."""
        flat = x.reshape(-1, x.shape[-1])
        sample = flat[:: max(1, len(flat) // SAMPLE_TOKENS)]
        exact, rounded = (linear.product(sample, f).float() for f in (None, ACTIVATION_FORMATS[NARROW]))
        error = float((rounded - exact).abs().sum() / exact.abs().sum().clamp_min(1e-30))
        peak = float(x.abs().amax() / x.abs().mean().clamp_min(1e-30))
        time = self.clock.time or 0.0
        self.observations.append(
            Observation(
                run=self.run,
                step=self.step,
                branch=self.branch,
                block=block,
                linear=name,
                change=self.change(block),
                error=error,
                peak=peak,
                time=time,
            )
        )
        return PURE

    def ran(self, block: int, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Record a run of the block, with a sample of its residual."""
        super().ran(block, inputs, outputs)
        flat = torch.cat([d.flatten() for d in self.state(block, inputs).deltas.values()])
        sampled = flat[:: max(1, len(flat) // SAMPLE_VALUES)].cpu().clone()
        self.residuals[self.run, self.branch, block][self.step] = sampled


class ErrorWeights(Protocol):
    """Factors of errors, as in ``influence.Influence``."""

    @property
    def by_time(self) -> tuple[tuple[float, float], ...]: ...
    @property
    def by_block(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Fit:
    """A policy and properties of its fit.

    pearson:  {linear: correlation of error and change} (NaN where one is constant)
    pairs:    number of fitted points; expected: share of skips and mean width on the observed runs
    """

    policy: StepPolicy
    pearson: dict[str, float]
    pairs: int
    expected: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary, for qkit.json and reports; an undefined correlation is null."""
        rounded = {n: None if math.isnan(r) else round(r, 4) for n, r in self.pearson.items()}
        return {"pearson": rounded, "pairs": self.pairs, "expected": self.expected}


def fit(
    observer: Observer,
    config: PolicyConfig,
    chosen: Mapping[str, str] | None = None,
    weights: ErrorWeights | None = None,
) -> Fit:
    """The policy that fits the observed runs.

    chosen:  {linear: NARROW or WIDE}, where formats are decided already; weights: factors of errors
    """
    policy = StepPolicy(fits={}, threshold=math.inf, most=MOST_SKIPS, kind=config.kind)
    if weights is not None:
        policy = replace(policy, by_time=weights.by_time, by_block=weights.by_block)
    points, squared_errors = defaultdict[str, list[tuple[float, float]]](list), defaultdict[str, list[float]](list)
    for observation in observer.observations:
        if observation.change is not None:
            points[observation.linear].append((observation.change, observation.error))
        squared_errors[observation.linear].append(
            (observation.error * policy.weight(observation.block, observation.time)) ** 2
        )
    fits, pearson = {}, {}
    for name, xy in points.items():
        fits[name], pearson[name] = least_squares(torch.tensor(xy, dtype=torch.float64))
        if config.kind == "static":
            fits[name] = 0.0, math.sqrt(sum(squared_errors[name]) / len(squared_errors[name]))
    policy = replace(policy, fits=fits)
    if config.kind != "dmpq":
        policy = replace(policy, by_time=(), by_block=())  # they are in the fits
    if config.skips and config.cache == "schedule":
        computed, steps = _schedule(observer, config.skips)
        if len(computed) < steps:
            gains = schedule_gains(observer.residuals, computed, steps)
            policy = replace(policy, computed=computed, steps=steps, purify=config.purify, gains=gains)
        skipped = {key: set(r) - set(computed) for key, r in observer.residuals.items()}
    else:
        tau = _tau(observer, config.skips) if config.skips else 0.0
        policy = replace(policy, tau=tau, purify=config.purify if tau else 0.0)
        skipped = {key: skips_of(r, tau) for key, r in observer.residuals.items()}
    if chosen is not None:
        fits = {name: (0.0, 0.0 if chosen[name] == NARROW else 1.0) for name in fits}
        policy = replace(policy, fits=fits, threshold=0.5)
    threshold, width = _threshold(observer, policy, skipped, config.width)
    share = sum(map(len, skipped.values())) / max(1, sum(map(len, observer.residuals.values())))
    expected = {"skips": round(share, 4), "width": round(width, 4)}
    return Fit(replace(policy, threshold=threshold), pearson, sum(map(len, points.values())), expected)


def least_squares(xy: Tensor) -> tuple[tuple[float, float], float]:
    """((slope, offset), Pearson r) of y against x, from xy [n, 2]; slope 0 and NaN where x is constant."""
    x, y = xy.unbind(1)
    dx, dy = x - x.mean(), y - y.mean()
    x_power, y_power, xy_power = float(dx.square().sum()), float(dy.square().sum()), float((dx * dy).sum())
    if x_power <= 1e-24:
        return (0.0, float(y.mean())), math.nan
    slope = xy_power / x_power
    return (slope, float(y.mean() - slope * x.mean())), xy_power / math.sqrt(
        x_power * y_power
    ) if y_power > 1e-24 else math.nan


def skips_of(residuals: dict[int, Tensor], tau: float, most_skips: int = MOST_SKIPS) -> set[int]:
    """Steps at which the cache rule would have skipped a block. residuals: {step: its residual}.

    Only residuals of computed steps are compared. The effect of skips on later blocks is not included.
    """
    skipped, summed, in_a_row = set[int](), 0.0, 0
    drift, computed_residual = None, None
    for step, residual in sorted(residuals.items()):
        if step >= WARM_UP and drift is not None:
            summed += drift
            if summed < tau and in_a_row < most_skips:
                in_a_row += 1
                skipped.add(step)
                continue
        if computed_residual is not None:
            drift = float((residual - computed_residual).abs().sum() / computed_residual.abs().sum().clamp_min(1e-30))
        summed, in_a_row, computed_residual = 0.0, 0, residual
    return skipped


def _schedule(observer: Observer, share: float) -> tuple[tuple[int, ...], int]:
    """(computed steps, number of all steps), with at most the given share skipped. Branches without all steps are ignored."""
    steps = 1 + max(s.step for s in observer.observations)
    features = [torch.stack([r[s] for s in range(steps)]) for r in observer.residuals.values() if len(r) == steps]
    costs = torch.stack([group_costs(f) for f in features]).mean(0)
    costs[: WARM_UP - 1, WARM_UP - 1 :] = math.inf  # the first steps are computed
    groups = max(WARM_UP - 1 + math.ceil((steps - WARM_UP + 1) / LONGEST), steps - int(steps * share))
    return best_groups(costs, groups), steps


def schedule_gains(
    residuals: Mapping[tuple[int, int, int], Mapping[int, Tensor]], computed: Sequence[int], steps: int
) -> dict[int, tuple[float, ...]]:
    """{skipped step: a factor for each block}, by least squares from reused to computed residuals, over runs and branches.

    CacheQuant (arXiv 2503.01323, decoupled error correction) fits a factor and an offset for every channel; on tiny-video
    one factor for all was as good, and needs less space.
    """
    blocks = 1 + max(block for _, _, block in residuals)
    sums = torch.zeros(2, steps, blocks, dtype=torch.float64)
    for (_, _, block), by_step in residuals.items():
        for step in set(by_step) - set(computed):
            reused = by_step.get(max(s for s in computed if s < step))
            if reused is not None:
                sums[0, step, block] += float((reused.double() * by_step[step].double()).sum())
                sums[1, step, block] += float(reused.double().square().sum())
    gains = torch.where(sums[1] > 0, sums[0] / sums[1].clamp_min(1e-300), 1.0).clamp(0, 2)
    return {s: tuple(round(g, 6) for g in gains[s].tolist()) for s in range(steps) if s not in computed}


def _tau(observer: Observer, share: float) -> float:
    """The largest tau, by bisection, with which at most the given share of block runs is skipped."""
    residuals = list(observer.residuals.values())
    count = sum(map(len, residuals))
    low, high = 0.0, 2.0 * (MOST_SKIPS + 1)  # a residual whose sign changes drifts by 2
    for _ in range(30):
        middle = (low + high) / 2
        skip_count = sum(len(skips_of(r, middle)) for r in residuals)
        low, high = (middle, high) if skip_count <= share * count else (low, middle)
    return low


def _threshold(
    observer: Observer, policy: StepPolicy, skipped: dict[tuple[int, int, int], set[int]], width: float
) -> tuple[float, float]:
    """(threshold, resulting mean width).

    The threshold is the policy's own if it is finite, else the one with which NVFP4 inputs give the requested width. With a
    cache, inputs with outliers count 16 bits, and inputs after a skip 8 bits.
    """
    predicted, count, pure = [], 0, 0
    for s in observer.observations:
        skips = skipped[s.run, s.branch, s.block]
        if s.step in skips:
            continue
        count += 1
        if policy.caches and policy.purify and s.peak > policy.purify:
            pure += 1
            continue
        expected = policy.predicted(s.linear, None if s.step - 1 in skips else s.change, s.block, s.time)
        if expected is not None:
            predicted.append(expected)
    predicted.sort()
    threshold = policy.threshold
    if not math.isfinite(threshold):
        spare_bits = BITS[WIDE] * count + (BITS[PURE] - BITS[WIDE]) * pure - width * count
        narrow = min(max(0, round(spare_bits / (BITS[WIDE] - BITS[NARROW]))), len(predicted))
        threshold = -math.inf if narrow == 0 else math.inf if narrow == count else predicted[narrow - 1]
    narrow = sum(p <= threshold for p in predicted)
    total_bits = BITS[WIDE] * (count - pure - narrow) + BITS[PURE] * pure + BITS[NARROW] * narrow
    return threshold, total_bits / max(1, count)
