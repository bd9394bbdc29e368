"""The input and the result of a solver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.statistics import Stats
from qkit.tensor.formats import Format
from qkit.tensor.qtensor import QTensor

# A reason to round that is no failure: outputs do not depend on the weights.
ZERO_INPUTS = "its inputs are all zero"


@dataclass(frozen=True, kw_only=True)
class Task:
    """The input of a solver: the weights of a group.

    weights:      float32 [out_i, in] each, finite
    fmt:          the format of all of them
    dtype:        the model's dtype, in which scales are stored
    stats:        statistics of their common input; None for solvers that need none
    amax:         float32 [1], largest magnitude in the group, for formats with a scale that all its weights share; else None
    options:      of this solver, as validated by its recipe entry
    prepared:     result of the solver's ``prepare``, computed once for a group whose rows are then solved in parallel slices
    tokens:       how many tokens reached the group (None: no rows were run)
    """

    weights: list[Tensor]
    fmt: Format
    dtype: torch.dtype
    stats: Stats | None = None
    amax: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    prepared: Any = None
    tokens: int | None = None


@dataclass(frozen=True)
class Solved:
    """The result of a solver. qtensors: one per weight, in order; fallback: why a simpler method was used, or None."""

    qtensors: list[QTensor]
    fallback: str | None = None
