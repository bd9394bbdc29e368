"""Learned rounding: the codes and ranges of a block are learned together from the error of its outputs.

SignRound (arXiv 2309.05516, section 3): a code is what w / s + v rounds to, and offsets v and factors of the scales s are
learned by signed gradient descent with a rate that falls to zero, on the squared error of the block's outputs. The
block's inputs come from the quantized blocks before it; its target outputs are those of the original model.

Our choices: learning begins with the codes of any solver, not with rounding (an offset begins where w / s + v just rounds to
the solver's code). E2M1 is supported: its offsets are in units of the grid's spacing around a value. Scales are rounded to
their dtype on disk in every step, with straight-through gradients. Held-out rows decide which step is kept, the solver's result
included, so a block is never worse there than before.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, OneByOne, PerRow, mapped
from qkit.calibration.statistics import Rows
from qkit.families.blocks import Linear
from qkit.nn.attention import PlainAttention
from qkit.rounding.learned_weight import LearnedWeight, LearningState
from qkit.system.parallel import Workers
from qkit.tensor.qtensor import QTensor

Span = tuple[int, int]
_HELD_OUT = 16  # one of this many rows is held out, and at most this many
LOOKS = 4  # evaluations of the held-out rows, at most
_FASTEST = 0.02
PIECE_TOKENS = 512  # that one worker runs through the block at a time


@dataclass(frozen=True)
class Settings:
    """Settings of learned rounding.

    steps: of gradient descent; batch: rows of one step; seed: of the order of batches
    rate:  of the first step, in units of the grid (0: 1.5 / steps, at most 0.02; fewer and longer steps from a solver's codes
           made the result worse)
    """

    steps: int
    batch: int
    rate: float
    seed: int


def held_out(rows: int) -> int:
    """Number of held-out rows among ``rows``: they decide which step is kept, and are not learned from."""
    return min(_HELD_OUT, max(1, rows // _HELD_OUT))


def reconstruct(
    module: nn.Module,
    learners: Sequence[LearnedWeight],
    rows: Rows,
    targets: Rows,
    call: Call | OneByOne,
    settings: Settings,
    pool: Workers,
    step: Callable[[], object],
    weigh: Tensor | None = None,
) -> tuple[list[QTensor], float, float]:
    """Learned weights in the order of ``learners``, and the mean squared error of held-out rows before and after.

    module:  the block; its weights are not written to, and hooks that quantize inputs stay active
    rows:    inputs of the block from quantized blocks; targets: outputs of the block in the original model
    weigh:   float32 [hidden, hidden], by which errors are multiplied before they are squared (``sensitivity.hidden``)
    """
    first_held = rows.count - held_out(rows.count)
    held_span = (first_held, rows.count)
    batches = list(_spans(0, first_held, settings.batch)) or [held_span]
    with torch.inference_mode(False):
        block = _Block(
            module,
            [x.linear for x in learners],
            rows,
            targets,
            cloned(call),
            pool,
            weigh,
        )
        states = [LearningState.begin(x.cloned(), rows.dtype) for x in learners]
        weights = pool.map(LearningState.weight, states)
        first_error = best_error = block.error(weights, held_span)
        best = pool.map(LearningState.result, states)
        order = torch.Generator().manual_seed(settings.seed)
        queue: list[int] = []
        for number in range(settings.steps):
            queue = queue or torch.randperm(len(batches), generator=order).tolist()
            gradients = block.gradients(weights, batches[queue.pop()])
            rate = (settings.rate or min(_FASTEST, 1.5 / settings.steps)) * (1 - number / settings.steps)
            weights = pool.map(lambda pair: pair[0].step(pair[1], rate), zip(states, gradients, strict=True))  # noqa: B023
            if (number + 1) % -(-settings.steps // LOOKS) == 0 or number + 1 == settings.steps:
                error = block.error(weights, held_span)
                if error < best_error:
                    best_error, best = error, pool.map(LearningState.result, states)
            step()
        return best, first_error, best_error


def held_out_error(
    module: nn.Module, rows: Rows, targets: Rows, call: Call | OneByOne, pool: Workers, weigh: Tensor | None
) -> float:
    """Mean squared error of the block's current outputs on held-out rows; arguments as for ``reconstruct``."""
    with torch.inference_mode(False):
        block = _Block(module, [], rows, targets, cloned(call), pool, weigh)
        return block.error([], (rows.count - held_out(rows.count), rows.count))


class _Block:
    """A block with its rows, their targets, and the linears whose weights are learned.

    Pieces of a batch run in parallel and are summed in order: the result does not depend on the number of workers.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Sequence[Linear],
        rows: Rows,
        targets: Rows,
        call: Call | OneByOne,
        pool: Workers,
        weigh: Tensor | None,
    ) -> None:
        self.module, self.linears, self.rows, self.targets, self.call, self.pool = (
            module,
            linears,
            rows,
            targets,
            call,
            pool,
        )
        self.weigh = None if weigh is None else weigh.to(rows.device, rows.dtype, copy=True)
        self.local = threading.local()  # weights are swapped into a module while it runs, so every worker has a copy

    def error(self, weights: Sequence[Tensor], batch: Span) -> float:
        """Mean squared error of the block's outputs."""

        def one(piece: Span) -> float:
            with PlainAttention():
                return float(self._summed_error(weights, piece))

        return sum(self.pool.map(one, self._pieces(batch))) / self._tokens(batch)

    def gradients(self, weights: Sequence[Tensor], batch: Span) -> list[tuple[Tensor, ...]]:
        """Gradients of the summed error: for each weight, those of every piece. Only signs of their sums are used."""

        def one(piece: Span) -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.enable_grad(), PlainAttention():
                leaves = [w.detach().requires_grad_() for w in weights]
                return torch.autograd.grad(
                    self._summed_error(leaves, piece), leaves, allow_unused=True, materialize_grads=True
                )

        return list(zip(*self.pool.map(one, self._pieces(batch)), strict=True))

    def _pieces(self, batch: Span) -> list[Span]:
        return list(_spans(*batch, 1 if self.rows.lead_shapes else max(1, PIECE_TOKENS // self.rows.tokens)))

    def _tokens(self, batch: Span) -> int:
        valid = self.rows.valid(*batch) if not self.rows.lead_shapes else None
        return self.rows.tokens * (batch[1] - batch[0]) if valid is None else max(1, int(valid.sum()))

    def _summed_error(self, weights: Sequence[Tensor], piece: Span) -> Tensor:
        """Sum over tokens of the mean squared error of their channels."""
        if not hasattr(self.local, "module"):
            with torch.inference_mode(False):
                self.local.module = copy.deepcopy(self.module)
        rows = self.rows
        by_param = {x.param: x.as_stored(w) for x, w in zip(self.linears, weights, strict=True)}
        outputs = self.call(
            _WithWeights(self.local.module, by_param),
            rows.read(*piece),
            slice(*piece),
        )
        errors = outputs.float() - self.targets.read(*piece).float()
        if self.weigh is not None:
            errors = (errors.to(rows.dtype) @ self.weigh).float()
        token_errors = errors.square().mean(-1).flatten()
        valid = rows.valid(*piece)
        return token_errors.sum() if valid is None else token_errors[valid].sum()


class _WithWeights(nn.Module):
    """A block with replaced weights; it is called like the block."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self.weights = module, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs of the block with the replaced weights."""
        return torch.func.functional_call(self.module, self.weights, args, kwargs)


def _spans(start: int, stop: int, step: int) -> Iterator[Span]:
    yield from ((i, min(i + step, stop)) for i in range(start, stop, step))


def cloned(call: Call | OneByOne) -> Call | OneByOne:
    """The call with tensors that autograd accepts, as ``LearnedWeight.cloned``."""
    if isinstance(call, OneByOne):
        return OneByOne(tuple(_one_cloned(c) for c in call.calls))
    return _one_cloned(call)


def _one_cloned(call: Call) -> Call:
    def clone(value: Any) -> Any:
        if isinstance(value, PerRow):
            return PerRow(tuple(clone(v) for v in value.values), value.dim)
        return value.clone() if isinstance(value, Tensor) else value

    return replace(call, args=mapped(clone, call.args), kwargs=mapped(clone, call.kwargs))
