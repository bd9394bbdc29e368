"""The learned parameters of one linear: rounding offsets and factors of its scales, which begin at a solver's codes.

An offset is in units of the grid's spacing around a weight (1 for integers), so E2M1 is learned like integers. Scales are
rounded to their dtype on disk whenever they are used. Of GGUF's types the minima stay those of the solver, and so do the
super-scales of K types: a factor moves the integer that a group has under them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.families.blocks import Linear
from qkit.rounding.learned_scale import scales_times, summed
from qkit.tensor import lowrank, sparse
from qkit.tensor.input_transform import InputTransform
from qkit.tensor.qtensor import (
    QTensor,
    code_range,
    codes_to_grid,
    effective_minimum,
    effective_scale,
    grid_spacing,
    grid_to_codes,
    round_to_grid,
    round_to_grid_,
    tiles,
    untile,
)

_FACTORS = (0.5, 1.5)  # of a scale, at the least and at the most
_INSIDE = 0.499  # of a cell, where an offset begins that has to reach a solver's code


@dataclass(frozen=True)
class LearnedWeight:
    """One linear.

    weight:     float32 [out, in], for transformed inputs, without the correction; q: the solver's result
    correction: float32 [out, in], the sparse and the low-rank part, which are not learned (None: there are none)
    """

    linear: Linear
    weight: Tensor
    q: QTensor
    inputs: InputTransform
    correction: Tensor | None = None

    @staticmethod
    def of(linear: Linear, weight: Tensor, q: QTensor, inputs: InputTransform) -> LearnedWeight:
        """A linear from its full weight, float32 [out, in], with the sparse and the low-rank part included."""
        if q.sparse is None and q.low_rank is None:
            return LearnedWeight(linear, weight, q, inputs)
        correction = torch.zeros_like(weight)
        if q.sparse is not None:
            sparse.add_(correction, q.sparse)
        if q.low_rank is not None:
            lowrank.add_(correction, q.low_rank)
        return LearnedWeight(linear, weight - correction, q, inputs, correction)

    def cloned(self) -> LearnedWeight:
        """The linear with tensors that autograd accepts: those made in inference mode cannot be saved for a backward pass."""
        p = self.q.params
        params = replace(p, **{name: t.clone() for name, t in vars(p).items() if t is not None})
        return replace(self, weight=self.weight.clone(), q=replace(self.q, params=params))

    def begin(self) -> tuple[Tensor, Tensor]:
        """Offsets [R, C, n] and factors [R, C, 1] that give the solver's codes and scales."""
        factor = torch.ones(*self.q.params.scale.shape, 1, device=self.q.params.scale.device)
        grid_position = self._grid_position(self._scale(factor))
        target = tiles(codes_to_grid(self.q.codes, self.q.format), self.q.format)
        spacing = self._spacing(grid_position)
        distance = (target - grid_position) / spacing
        offset = torch.zeros_like(grid_position)
        for candidate in (
            distance - distance.clamp(-_INSIDE, _INSIDE),
            distance,
        ):  # to the edge of the cell, or, where that fails, into it
            differs = round_to_grid(grid_position + offset * spacing, self.q.format) != target
            offset = torch.where(differs, candidate, offset)
        return offset, factor

    def dense(self, offset: Tensor, factor: Tensor) -> Tensor:
        """The dequantized weight for untransformed inputs, float32 [out, in]."""
        scale = self._scale(factor)
        grid = round_to_grid_(self._with_offset(self._grid_position(scale), offset), self.q.format)
        values = self._above_zero_(grid).mul_(scale)
        minimum = self._minimum()
        weight = untile(values if minimum is None else values.add_(minimum), self.q.format, self.q.shape)
        return self.inputs.weight_back(weight if self.correction is None else weight + self.correction)

    def gradients(self, offset: Tensor, factor: Tensor, weight_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of offsets and factors, up to positive factors, from that of ``dense``, float32 [out, in].

        They are straight-through: rounding inside the range of codes and of scales to their dtype is ignored.
        """
        scale = self._scale(factor)
        grid_position, sign = self._grid_position(scale), scale.sign()
        moved_position, by_dense, by_offset = self._by_offset(grid_position, offset, weight_gradient)
        # The weight is (grid - zero) * scale, and the place on the grid, w / scale + zero, moves towards zero as scales rise.
        by_scale = self._above_zero_(round_to_grid_(moved_position, self.q.format)).mul_(by_dense)
        by_scale.addcmul_(self._above_zero_(grid_position), by_offset, value=-1)
        return by_offset.mul_(sign), by_scale.sum(-1, keepdim=True).mul_(sign)

    def _by_offset(
        self, grid_position: Tensor, offset: Tensor, weight_gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions with offsets, and gradients of the weight [R, C, n]: all of them, and those inside the range of codes."""
        moved_position = self._with_offset(grid_position, offset)
        by_dense = tiles(self.inputs.weight_slope(weight_gradient), self.q.format)
        outside = moved_position.clamp(*code_range(self.q.format)) != moved_position
        return moved_position, by_dense, by_dense.masked_fill(outside, 0.0)

    def finish(self, offset: Tensor, factor: Tensor) -> QTensor:
        """The codes and scales that were learned."""
        grid_position = self._grid_position(self._scale(factor))
        codes = grid_to_codes(round_to_grid_(self._with_offset(grid_position, offset), self.q.format), self.q.format)
        params = replace(self.q.params, scale=self._stored(factor))
        return replace(self.q, codes=untile(codes, self.q.format, self.q.shape).contiguous(), params=params)

    def _spacing(self, grid_position: Tensor) -> Tensor:
        return grid_spacing(grid_position.clamp(*code_range(self.q.format)), self.q.format)

    def _grid_position(self, scale: Tensor) -> Tensor:
        """Positions of the weights on the grid, [R, C, n]."""
        zero, minimum = self.q.params.zero, self._minimum()
        values = tiles(self.weight, self.q.format)
        position = (values if minimum is None else values - minimum) / scale
        return position if zero is None else position.add_(zero.float()[..., None])

    def _with_offset(self, grid_position: Tensor, offset: Tensor) -> Tensor:
        """Positions on the grid with offsets added, [R, C, n]."""
        return (
            grid_position + offset
            if self.q.format.kind in ("int", "uint")
            else torch.addcmul(grid_position, offset, self._spacing(grid_position))
        )

    def _above_zero_(self, grid: Tensor) -> Tensor:
        """The grid positions minus the zero point, in place."""
        return grid if self.q.params.zero is None else grid.sub_(self.q.params.zero.float()[..., None])

    def _minimum(self) -> Tensor | None:
        """What is added to the scaled codes, [R, C, 1]; None for formats without it."""
        minimum = effective_minimum(self.q.params)
        return None if minimum is None else minimum[..., None]

    def _scale(self, factor: Tensor) -> Tensor:
        """Effective scales [R, C, 1] as the file will hold them."""
        return effective_scale(replace(self.q.params, scale=self._stored(factor)), self.q.format)[..., None]

    def _stored(self, factor: Tensor) -> Tensor:
        """Scales in their dtype on disk."""
        return scales_times(self.q.params, factor[..., 0], self.q.format)


class LearningState:
    """One linear during gradient descent. first: the offsets that it began with; None: all zero"""

    def __init__(
        self, learner: LearnedWeight, dtype: torch.dtype, offset: Tensor, factor: Tensor, first: Tensor | None
    ) -> None:
        self.learner, self.dtype, self.offset, self.factor, self.first = learner, dtype, offset, factor, first

    @classmethod
    def begin(cls, learner: LearnedWeight, dtype: torch.dtype) -> LearningState:
        """The state before the first step. dtype: of the rows."""
        offset, factor = learner.begin()
        return cls(learner, dtype, offset, factor, offset.clone() if bool(offset.any()) else None)

    def weight(self) -> Tensor:
        """The current weight [out, in], in the dtype of the rows."""
        with torch.inference_mode(False):
            return self.learner.dense(self.offset, self.factor).to(self.dtype)

    def step(self, gradients: Sequence[Tensor], rate: float) -> Tensor:
        """The weight after a step of length ``rate`` along the signs of the summed gradients of all pieces."""
        with torch.inference_mode(False):
            by_offset, by_factor = self.learner.gradients(self.offset, self.factor, summed(gradients))
            if (
                self.learner.q.format.strategy != "tensor"
            ):  # the only scale may be shared with linears that engines fuse
                self.factor.sub_(by_factor.sign_(), alpha=rate).clamp_(*_FACTORS)
            return self._step_to(by_offset.sign_(), rate)

    def _step_to(self, direction: Tensor, rate: float) -> Tensor:
        self.offset.sub_(direction, alpha=rate)
        if self.first is None:
            self.offset.clamp_(-0.5, 0.5)
        else:  # a cell around the place of the beginning, and one around the weight's own
            self.offset.clamp_(self.first.clamp_max(0).sub_(0.5), self.first.clamp_min(0).add_(0.5))
        return self.weight()

    def result(self) -> QTensor:
        """What the current offsets and factors stand for."""
        with torch.inference_mode(False):
            return self.learner.finish(self.offset, self.factor)
