"""Learned scales of one linear, whose codes stay: a factor for each scale, and Adam's moments of it.

Scales are rounded to their dtype on disk whenever they are used; gradients are straight-through. Of GGUF's K types the
super-scales are learned, since the integers under them are far apart; minima stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.families.blocks import Linear
from qkit.tensor.block_params import nearest_integers, to_f16
from qkit.tensor.formats import Format
from qkit.tensor.input_transform import InputTransform
from qkit.tensor.params import Params
from qkit.tensor.qtensor import QTensor, codes_to_grid, dequantize, effective_scale, tiles

# Of moments: fewer steps than usual, so that a shorter memory fits. Our choice.
_BETAS, _EPSILON = (0.9, 0.95), 1e-12


def has_learned_scales(fmt: Format) -> bool:
    """Whether scales of a format can be learned: not exponents or FP8, whose values are further apart than a factor moves, and
    not the only scale of a tensor, which may be shared with linears that engines fuse."""
    return fmt.scale not in ("e8m0", "e4m3") and fmt.strategy != "tensor"


def scales_times(p: Params, factor: Tensor, fmt: Format) -> Tensor:
    """Scales [R, C] times factors, float32 [R, C], in their dtype on disk. Exponents stay as they are."""
    scale = p.scale
    if scale.dtype == torch.uint8:
        return scale
    scaled = scale.float() * factor
    if p.super_scale is not None:
        return nearest_integers(scaled, fmt)
    if scale.dtype == torch.float16 and fmt.gguf:
        return to_f16(scaled)
    limits = torch.finfo(scale.dtype)
    return scaled.abs().clamp(limits.tiny, limits.max).copysign(scaled).to(scale.dtype)


def summed(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the gradients of all pieces, in their order, float32."""
    total = gradients[0].to(torch.float32, copy=True)
    for gradient in gradients[1:]:
        total += gradient
    return total


@dataclass(frozen=True)
class LearnedScale:
    """One linear. q: the result of a solver; inputs: the run-time transform of what it reads"""

    linear: Linear
    q: QTensor
    inputs: InputTransform

    @property
    def _learned(self) -> Tensor:
        """The scales that factors are for, in their dtype on disk: [R, C], or the super-scales [R, super-blocks]."""
        p = self.q.params
        return p.scale if p.super_scale is None else p.super_scale

    def begin(self) -> Tensor:
        """The state before the first step, float32 [3, *scales]: factors of one, and both moments."""
        state = torch.zeros(3, *self._learned.shape, device=self._learned.device)
        state[0] = 1
        return state

    def result(self, factor: Tensor) -> QTensor:
        """What factors stand for."""
        return self.with_scales(self.scales(factor))

    def scales(self, factor: Tensor) -> Tensor:
        """The learned scales in their dtype on disk."""
        p, fmt = self.q.params, self.q.format
        return scales_times(p, factor, fmt) if p.super_scale is None else to_f16(p.super_scale.float() * factor)

    def with_scales(self, scales: Tensor) -> QTensor:
        """The weight with such scales."""
        name = "scale" if self.q.params.super_scale is None else "super_scale"
        return replace(self.q, params=replace(self.q.params, **{name: scales}))

    def dense(self, factor: Tensor) -> Tensor:
        """The dequantized weight for untransformed inputs, float32 [out, in]."""
        return self.inputs.weight_back(dequantize(self.result(factor)))

    def step(self, state: Tensor, gradients: Sequence[Tensor], number: int, rate: float) -> Tensor:
        """The state after a step of Adam (arXiv 1412.6980, algorithm 1).

        gradients: those of all pieces at the weight [out, in], which are summed; number: of the step, from 1
        """
        if not has_learned_scales(self.q.format):
            return state
        factor, mean, square = state
        gradient = self._gradient(summed(gradients))
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * gradient
        square = _BETAS[1] * square + (1 - _BETAS[1]) * gradient.square()
        size = (square / (1 - _BETAS[1] ** number)).sqrt_().add_(_EPSILON)
        moved = factor - rate * mean / (1 - _BETAS[0] ** number) / size
        return torch.stack((moved, mean, square))

    def _gradient(self, weight_gradient: Tensor) -> Tensor:
        """Gradients of the factors from that of ``dense``, float32 [out, in]."""
        values = tiles(codes_to_grid(self.q.codes, self.q.format), self.q.format)
        if self.q.params.zero is not None:
            values = values - self.q.params.zero.float()[..., None]
        by_dense = tiles(self.inputs.weight_slope(weight_gradient), self.q.format)
        by_group = (values * by_dense).sum(-1) * effective_scale(self.q.params, self.q.format)
        by_scale: Tensor = by_group.unflatten(1, (self._learned.shape[1], -1)).sum(-1)
        return by_scale
