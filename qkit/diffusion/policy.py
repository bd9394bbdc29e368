"""Policies for the steps of a sampler: 6Bit-Diffusion (arXiv 2603.18742) as data.

Dynamic mixed precision (section 4.1, Eq. 3-7): one NVFP4 weight; a linear's inputs are NVFP4 where the predicted
error is below a threshold, and INT8 elsewhere. The prediction uses the change that the block made to its input one step
earlier.
Temporal delta cache (4.2, Eq. 9-11): a block whose residual has hardly changed is skipped. Purified delta refresh (4.3,
Eq. 12): inputs with outliers are not quantized in runs that write this cache.

The paper leaves open the threshold, tau and the measure of change (norms, denominators). Our choices: relative L1 everywhere,
and both thresholds from calibration, so that mean width and share of skipped blocks are as requested.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

BY_STEP = "6BIT"  # the scheme that asks for a policy
NARROW, WIDE, PURE = "nvfp4_dynamic", "int8_token", "as they are"  # inputs of a linear: names of activation formats
BITS = {NARROW: 4, WIDE: 8, PURE: 16}
MOST_SKIPS = 2  # in a row: section 4.2
WARM_UP = 2  # steps at the start of a run that are always computed: our choice
OUTLIERS = 25.0  # max |x| / mean |x| from which inputs are left as they are on a step that writes the cache: Eq. 12


class PolicyConfig(BaseModel):
    """A policy as recipes have it.

    kind: dmpq: precision by step; static: every linear has one for all steps, those with the least error NVFP4; decoupled: one
          for all steps too, by what each does to samples (``sensitivity.decoupled``)
    width: mean bits of inputs over all (step, linear) that are computed, 4 (all NVFP4) to 8 (all INT8)
    skips: share of the runs of blocks that the cache is to save; 0: no cache
    purify: ratio of Eq. 12; 0: never
    cache: delta: a block is skipped while its residual hardly changes; schedule: all blocks are, at steps decided beforehand
           (``diffusion.schedule``), for as many steps as calibration has
    weigh: whether predicted errors are weighed by what they do to the end of a run (``diffusion.influence``)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["dmpq", "static", "decoupled"] = "dmpq"
    width: float = Field(default=6.0, ge=4.0, le=8.0)
    skips: float = Field(default=0.25, ge=0.0, le=0.6)
    purify: float = Field(default=OUTLIERS, ge=0.0)
    cache: Literal["delta", "schedule"] = "delta"
    weigh: bool = False


@dataclass(frozen=True, kw_only=True)
class StepPolicy:
    """The policy of a controller.

    fits:      by linear (module name), (slope, offset) of the predicted relative error of its output under NVFP4 inputs against
               the relative change that its block made one step earlier
    threshold: of that prediction; above it inputs are INT8. -inf: always INT8, inf: always NVFP4
    tau:       of the summed relative changes of a block's residual, below which it is not run; 0: it always is
    most:      skips in a row, at the most
    purify, kind: as in ``PolicyConfig``
    computed:  steps at which blocks are run, of ``steps`` in all, where that is decided beforehand; else none
    gains:     by step that is not computed, and by block, what the residual is multiplied by before it is reused
    by_time, by_block: what predicted errors are multiplied by: (time, factor) with times ascending, between which it is
               interpolated, and factors of the blocks; none: 1
    """

    fits: dict[str, tuple[float, float]]
    threshold: float
    tau: float = 0.0
    most: int = MOST_SKIPS
    purify: float = 0.0
    kind: str = "dmpq"
    computed: tuple[int, ...] = ()
    steps: int = 0
    gains: dict[int, tuple[float, ...]] = field(default_factory=dict)
    by_time: tuple[tuple[float, float], ...] = ()
    by_block: tuple[float, ...] = ()

    @property
    def caches(self) -> bool:
        """Whether the policy may skip runs of blocks."""
        return self.tau > 0 or bool(self.computed)

    def predicted(self, linear: str, change: float | None, block: int = 0, time: float | None = None) -> float | None:
        """Predicted and weighted error of NVFP4 inputs; None where the block did not run one step earlier."""
        if linear not in self.fits or (change is None and self.kind == "dmpq"):
            return None
        slope, offset = self.fits[linear]
        return (slope * (change or 0.0) + offset) * self.weight(block, time)

    def weight(self, block: int, time: float | None) -> float:
        """Weight of an error in a block at a time."""
        factor = self.by_block[block] if block < len(self.by_block) else 1.0
        if self.by_time and time is not None:
            import numpy as np  # here, so that the help of commands does not wait for it

            times, factors = zip(*self.by_time, strict=True)
            factor *= float(np.interp(time, list(times), list(factors)))
        return factor

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary, with infinities as strings."""
        gains = {str(step): list(row) for step, row in self.gains.items()}
        return {**asdict(self), "threshold": _json_float(self.threshold), "tau": _json_float(self.tau), "gains": gains}

    @staticmethod
    def from_json(data: dict[str, Any]) -> StepPolicy:
        """The policy of a dictionary made by ``to_json``. Raises ValueError."""
        if data.get("kind") not in get_args(PolicyConfig.model_fields["kind"].annotation):
            raise ValueError(f"policy of kind {data.get('kind')!r}")
        fits = {str(k): (float(a), float(b)) for k, (a, b) in data["fits"].items()}
        if any(math.isnan(float(x)) for x in (data["threshold"], data["tau"], data["purify"])):
            raise ValueError("a threshold is not a number")
        threshold, tau, purify = (float(data[k]) for k in ("threshold", "tau", "purify"))
        computed = tuple(int(s) for s in data.get("computed", ()))
        gains = {int(step): tuple(float(g) for g in row) for step, row in data.get("gains", {}).items()}
        by_time = tuple((float(t), float(w)) for t, w in data.get("by_time", ()))
        by_block = tuple(float(w) for w in data.get("by_block", ()))
        return StepPolicy(
            fits=fits,
            threshold=threshold,
            tau=tau,
            most=int(data["most"]),
            purify=purify,
            kind=data["kind"],
            computed=computed,
            steps=int(data.get("steps", 0)),
            gains=gains,
            by_time=by_time,
            by_block=by_block,
        )


def _json_float(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def mean_width(widths: list[int]) -> float:
    """Mean bits of inputs; NaN of none."""
    return sum(widths) / len(widths) if widths else math.nan
