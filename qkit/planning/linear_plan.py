"""The decisions for one weight matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qkit.tensor.formats import Format, Scheme

_NARROW = 4  # bits


@dataclass(frozen=True, kw_only=True)
class LinearPlan:
    """The decisions for one linear. outliers: how many of its weights, the largest, go to a sparse part before it is
    quantized; rank: of its low-rank part, 0: none; rotation: block of the Hadamard transform of its inputs, 0: none;
    residual: how many of its input channels are quantized twice; uses: of a matrix outside the blocks, EMBEDDINGS, HEAD or both
    of ``families.ends``; note: what is unusual about it (an adapted group size,
    a rule)."""

    name: str
    shape: tuple[int, int]
    scheme: str
    weights: Format
    activations: Format | None
    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    outliers: int = 0
    rank: int = 0
    rotation: int = 0
    residual: int = 0
    uses: tuple[str, ...] = ()
    note: str = ""

    @property
    def pair(self) -> Scheme:
        """The format of the weight and that of its inputs."""
        return Scheme(self.scheme, self.weights, self.activations)

    def drift_dtype(self, run_dtype: str) -> str:
        """The dtype of the products of the change of inputs, for 'compensate'. run_dtype: of the plan

        Products in bf16 are faster where blocks run in it. Their rounding is far below that of weights of up to 4 bits. For
        wider weights it is not, since the inverse of the Hessian enlarges it.
        """
        return "bfloat16" if run_dtype == "bfloat16" and self.weights.bits <= _NARROW else "float32"
