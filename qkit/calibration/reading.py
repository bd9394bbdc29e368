"""What becomes of the inputs of a group of layers before their statistics are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the layers of a group read their inputs.

    transform: of the inputs, as layers apply it
    divided:   float32 [in], what the inputs are divided by since those of the original model were saved
    rounding:  quantization of transformed inputs. Hessian and sample are of quantized inputs, which are what weights are
               multiplied with; ranges, and the drift from the original, are of those before
    weights:   float32 [rows, tokens], what each token counts in Hessian, drift and sample; mean 1
    drift:     dtype of the products of the drift
    """

    transform: Callable[[Tensor], Tensor] | None = None
    divided: Tensor | None = None
    rounding: Callable[[Tensor], Tensor] | None = None
    weights: Tensor | None = None
    drift: torch.dtype = torch.float32

    def transformed(self, x: Tensor) -> Tensor:
        """The inputs that statistics are taken of."""
        return x if self.transform is None else self.transform(x)

    def roots(self, count: int, rows: slice, valid: Tensor | None) -> Tensor | None:
        """float32 [count, 1], the roots of the weights of the tokens of some rows; None where all count the same.

        Experts, who see some tokens alone, and layers that run several times have no weights. valid: bool [tokens of the rows],
        those that are there; None: all
        """
        if self.weights is None:
            return None
        weights = self.weights[rows].flatten()
        weights = weights if valid is None or len(valid) != len(weights) else weights[valid]
        return weights.sqrt()[:, None] if len(weights) == count else None

    def entering(self, x: Tensor, roots: Tensor | None) -> Tensor | None:
        """What products of inputs are of, from transformed inputs; None: of these themselves."""
        if self.rounding is None and roots is None:
            return None
        rounded = x if self.rounding is None else self.rounding(x)
        return rounded if roots is None else rounded.float() * roots

    def away(self, saved: Tensor, x: Tensor, roots: Tensor | None) -> Tensor:
        """[n, in], the inputs in the original model minus the transformed ones of this one, in the dtype of ``drift``."""
        original = saved if self.divided is None else saved.float() / self.divided
        away = self.transformed(original).float() - x.float()
        return (away if roots is None else away * roots).to(self.drift)


PLAIN_READING = Reading()
