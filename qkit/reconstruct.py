"""Learned rounding: the codes and ranges of a whole block, chosen together by what the block gives.

SignRound (arXiv 2309.05516, section 3): a code is what w / s + v rounds to, and offsets v and factors of the scales s are
learned by signed gradient descent with a rate that falls to zero, on the squared error of the block's outputs. The block is
given what comes out of the quantized blocks before it, and is to give what the original gives in the original model.

Ours: it begins from the codes of any solver, not from rounding (an offset begins where w / s + v just rounds to the solver's
code); E2M1 too, whose offsets count in the spacing of the grid around a value; scales are rounded to their dtype on disk in
every step, with straight-through gradients; held-out rows decide which step is kept, the solver's result among them, so
that a block is never worse there than before.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.blocks import Linear
from qkit.calls import Call, OneByOne, PerRow, mapped
from qkit.capture import Rows
from qkit.inputs import InputTransform
from qkit.parallel import Workers
from qkit.qtensor import (
    Params,
    QTensor,
    code_range,
    codes_to_grid,
    effective_scale,
    grid_spacing,
    grid_to_codes,
    round_to_grid,
    tiles,
    untile,
)
from qkit.sparse import add_

Span = tuple[int, int]
_HELD_OUT = 16  # of so many rows one is held out
_LOOKS = 8  # at the held-out rows, at the most
_INSIDE = 0.499  # of a cell, where an offset begins that has to reach a solver's code
_FACTORS = (0.5, 1.5)  # of a scale, at the least and at the most
_FASTEST = 0.02
_PIECE_TOKENS = 512  # that one worker runs through the block at a time


@dataclass(frozen=True)
class Settings:
    """steps: of the descent; batch: rows of one; rate: of the first step, in units of the grid (0: 1 / steps, at most 0.02:
    from a solver's codes on, few long steps end in a worse place than they began); seed: of the order of batches"""

    steps: int
    batch: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Learner:
    """One linear. weight: float32 [out, in], for transformed inputs; q: what the solver made of it; apart: the sparse part,
    which stays as it is and is no part of weight, float32 [out, in]."""

    linear: Linear
    weight: Tensor
    q: QTensor
    inputs: InputTransform
    apart: Tensor | None = None

    @staticmethod
    def of(linear: Linear, weight: Tensor, q: QTensor, inputs: InputTransform) -> Learner:
        """weight: with the sparse part in it."""
        if q.sparse is None:
            return Learner(linear, weight, q, inputs)
        apart = add_(torch.zeros_like(weight), q.sparse)
        return Learner(linear, weight - apart, q, inputs, apart)

    def cloned(self) -> Learner:
        """With tensors that gradients may pass: what was made without them cannot be kept for a backward pass."""
        p = self.q.params
        zero, shared = (None if t is None else t.clone() for t in (p.zero, p.global_scale))
        return replace(
            self, weight=self.weight.clone(), q=replace(self.q, params=Params(p.scale.clone(), zero, shared))
        )

    def begin(self) -> tuple[Tensor, Tensor]:
        """Offsets [R, C, n] and factors [R, C, 1] that give the solver's codes and scales."""
        factor = torch.ones_like(self._scale(torch.ones(())))
        target, place = tiles(codes_to_grid(self.q.codes, self.q.format), self.q.format), self._place(factor)
        spacing = self._spacing(place)
        away = (target - place) / spacing
        offset = torch.zeros_like(place)
        for tried in (
            away - away.clamp(-_INSIDE, _INSIDE),
            away,
        ):  # to the edge of the cell, or, where that fails, into it
            wrong = round_to_grid(place + offset * spacing, self.q.format) != target
            offset = torch.where(wrong, tried, offset)
        return offset, factor

    def dense(self, offset: Tensor, factor: Tensor) -> Tensor:
        """float32 [out, in] for inputs as they are; gradients pass as if nothing inside the range were rounded."""
        place, (low, high) = self._place(factor), code_range(self.q.format)
        moved = (place + offset * self._spacing(place)).clamp(low, high)
        grid = moved + (round_to_grid(moved.detach(), self.q.format) - moved).detach()
        if self.q.params.zero is not None:
            grid = grid - self.q.params.zero.float()[..., None]
        whole = untile(grid * self._scale(factor), self.q.format, self.q.shape)
        return self.inputs.weight_back(whole if self.apart is None else whole + self.apart)

    def finish(self, offset: Tensor, factor: Tensor) -> QTensor:
        """The codes and scales that were learned."""
        place = self._place(factor)
        codes = grid_to_codes(round_to_grid(place + offset * self._spacing(place), self.q.format), self.q.format)
        params = replace(self.q.params, scale=self._stored(factor))
        return QTensor(untile(codes, self.q.format, self.q.shape).contiguous(), params, self.q.format, self.q.sparse)

    def _spacing(self, place: Tensor) -> Tensor:
        return grid_spacing(place.detach().clamp(*code_range(self.q.format)), self.q.format)

    def _place(self, factor: Tensor) -> Tensor:
        """Where the weights lie on the grid, [R, C, n]."""
        zero = self.q.params.zero
        found = tiles(self.weight, self.q.format) / self._scale(factor)
        return found if zero is None else found + zero.float()[..., None]

    def _scale(self, factor: Tensor) -> Tensor:
        """Effective scales [R, C, 1] as the file will hold them; gradients pass to the factor as if they were not rounded."""
        plain = effective_scale(self.q.params, self.q.format)[..., None] * factor
        with torch.no_grad():
            stored = effective_scale(replace(self.q.params, scale=self._stored(factor)), self.q.format)[..., None]
        return plain + (stored - plain).detach()

    def _stored(self, factor: Tensor) -> Tensor:
        """Scales in their dtype on disk."""
        scale = self.q.params.scale
        if scale.dtype == torch.uint8:  # exponents: a factor cannot reach the next one
            return scale
        limits = torch.finfo(scale.dtype)
        wide = scale.float() * factor.detach().expand(*scale.shape, 1)[..., 0]
        return wide.abs().clamp(limits.tiny, limits.max).copysign(wide).to(scale.dtype)


def reconstruct(
    module: nn.Module,
    learners: Sequence[Learner],
    rows: Rows,
    targets: Rows,
    call: Call | OneByOne,
    settings: Settings,
    pool: Workers,
    step: Callable[[], object],
    weigh: Tensor | None = None,
) -> tuple[list[QTensor], float, float]:
    """Learn the linears of a block together.

    module: the block; its weights are not written to, hooks of its linears that quantize their inputs stay in force
    rows, targets: what enters the block as quantized so far, and what leaves it in the original model
    weigh: float32 [hidden, hidden], what errors are multiplied by before they are squared (``sensitivity.hidden``)
    Gives what was learned, in the order of ``learners``, and the mean squared error of held-out rows before and after.
    """
    first_held = rows.count - max(1, rows.count // _HELD_OUT)
    held = (first_held, rows.count)
    given = list(_spans(0, first_held, settings.batch)) or [held]
    with torch.inference_mode(False):
        block = _Block(module, rows, targets, _cloned(call), pool, None if weigh is None else weigh.clone())
        learners = [x.cloned() for x in learners]
        values = [x.begin() for x in learners]
        begun = [offset.clone() for offset, _ in values]

        def weights() -> dict[str, Tensor]:
            made = zip(learners, values, strict=True)
            return {x.linear.param: x.dense(*v).to(rows.dtype) for x, v in made}

        before = least = block.error(weights(), held)
        best = [(v.clone(), f.clone()) for v, f in values]
        order = torch.Generator().manual_seed(settings.seed)
        queue: list[int] = []
        for number in range(settings.steps):
            queue = queue or torch.randperm(len(given), generator=order).tolist()
            slopes = block.gradients(weights(), given[queue.pop()])
            rate = (settings.rate or min(_FASTEST, 1 / settings.steps)) * (1 - number / settings.steps)
            for x, (offset, factor), first in zip(learners, values, begun, strict=True):
                slope = slopes.pop(x.linear.param)
                for v, g in zip((offset, factor), _through(x, offset, factor, slope), strict=True):
                    v.sub_(g.sign_(), alpha=rate)
                offset.clamp_(first.clamp_max(0) - 0.5, first.clamp_min(0) + 0.5)
                factor.clamp_(*_FACTORS)
            if (number + 1) % -(-settings.steps // _LOOKS) == 0 or number + 1 == settings.steps:
                now = block.error(weights(), held)
                if now < least:
                    least, best = now, [(v.clone(), f.clone()) for v, f in values]
            step()
        return [x.finish(*v) for x, v in zip(learners, best, strict=True)], before, least


def _through(x: Learner, offset: Tensor, factor: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    """Gradients by offset and factor, from that by the weight: one linear at a time, so that no more is held than one needs."""
    leaves = tuple(v.detach().requires_grad_() for v in (offset, factor))
    with torch.enable_grad():
        made = x.dense(*leaves)
    return torch.autograd.grad(made, leaves, slope.float())


class _Block:
    """A block, its rows and what they should become.

    Pieces of a batch run side by side and are added up in order: what is learned does not depend on the number of workers.
    """

    def __init__(
        self, module: nn.Module, rows: Rows, targets: Rows, call: Call | OneByOne, pool: Workers, weigh: Tensor | None
    ) -> None:
        self.module, self.rows, self.targets, self.call, self.pool = module, rows, targets, call, pool
        self.weigh = weigh
        self.local = threading.local()  # weights are put into a module while it runs: every worker has one of its own

    def error(self, weights: dict[str, Tensor], batch: Span) -> float:
        """Mean squared error of what leaves the block."""

        def one(piece: Span) -> float:
            return float(self._lost(weights, piece))

        return sum(self.pool.map(one, self._pieces(batch))) / self._tokens(batch)

    def gradients(self, weights: dict[str, Tensor], batch: Span) -> dict[str, Tensor]:
        """Of that error, times the tokens of the batch, by weight: only signs are used."""

        def one(piece: Span) -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.enable_grad():
                leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
                return torch.autograd.grad(self._lost(leaves, piece), list(leaves.values()))

        found = self.pool.stream(one, self._pieces(batch))
        total = [g.float() for g in next(found)]
        for more in found:
            for sum_, g in zip(total, more, strict=True):
                sum_ += g
        return dict(zip(weights, total, strict=True))

    def _pieces(self, batch: Span) -> list[Span]:
        return list(_spans(*batch, 1 if self.rows.leads else max(1, _PIECE_TOKENS // self.rows.tokens)))

    def _tokens(self, batch: Span) -> int:
        counted = self.rows.counted(*batch) if not self.rows.leads else None
        return self.rows.tokens * (batch[1] - batch[0]) if counted is None else max(1, int(counted.sum()))

    def _lost(self, weights: dict[str, Tensor], piece: Span) -> Tensor:
        """Sum over tokens of the mean squared error of their channels."""
        if not hasattr(self.local, "module"):
            with torch.inference_mode(False):
                self.local.module = copy.deepcopy(self.module)
        rows = self.rows
        made = self.call(_Called(self.local.module, weights), rows.read(*piece), slice(*piece))
        wrong = made.float() - self.targets.read(*piece).float()
        lost = (wrong if self.weigh is None else wrong @ self.weigh).square().mean(-1).flatten()
        counted = rows.counted(*piece)
        return lost.sum() if counted is None else lost[counted].sum()


class _Called(nn.Module):
    """A block with other weights, to be called as the block is."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self.weights = module, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's."""
        return torch.func.functional_call(self.module, self.weights, args, kwargs)


def _spans(start: int, stop: int, step: int) -> Iterator[Span]:
    yield from ((i, min(i + step, stop)) for i in range(start, stop, step))


def _cloned(call: Call | OneByOne) -> Call | OneByOne:
    """As ``Learner.cloned``."""
    if isinstance(call, OneByOne):
        return OneByOne(tuple(_one_cloned(c) for c in call.each))
    return _one_cloned(call)


def _one_cloned(call: Call) -> Call:
    def clone(value: Any) -> Any:
        if isinstance(value, PerRow):
            return PerRow(tuple(clone(v) for v in value.each), value.dim)
        return value.clone() if isinstance(value, Tensor) else value

    return replace(call, args=mapped(clone, call.args), kwargs=mapped(clone, call.kwargs))
