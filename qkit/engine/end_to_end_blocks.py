"""End-to-end learning with one block in memory.

The gradient of a block's weights becomes a step of its scales as soon as the way back has passed it. Factors and weights of
all other blocks are in a file, and so is what the original model's last block gives, which no step changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkit.engine.chain import Chain, spans, with_fragments
from qkit.engine.entry import quantizing_hook
from qkit.engine.job import Job
from qkit.families.blocks import BlockStructure, Linear
from qkit.families.structure import ModelStructure
from qkit.nn.attention import LONGEST
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan, parts
from qkit.rounding.learned_scale import LearnedScale
from qkit.rounding.sliced import divergence, divergence_gradient, slice_bytes
from qkit.system.memory import give_back
from qkit.tensor.params import param_shape
from qkit.tensor.qtensor import QTensor

_STEP = 24  # bytes of buffers for each weight of a linear whose scales make a step


@dataclass(frozen=True)
class _Stored:
    """A linear of a block, and the places of its tensors in the file.

    part: index of its part in the job; state: factors of scales and their moments; weight: as the model runs with it;
    best: the scales to keep
    """

    linear: Linear
    plan: LinearPlan
    part: int
    state: int
    weight: int
    best: int


class BlockwiseModel:
    """The original and the quantized model as chains of blocks that are read from the disk.

    Pieces of a batch run in parallel and are summed in order: the result does not depend on the number of workers.
    """

    def __init__(self, plan: Plan, structure: ModelStructure, job: Job, chain: Chain, rows: Sequence[int]) -> None:
        """rows: all that will be read"""
        assert plan.calibration is not None
        self.chain, self.job, self.pool, self.mask = chain, job, chain.pool, plan.calibration.mask
        self.file = chain.offloaded()
        self.part_of = {block.path: i for i, block in enumerate(parts(plan, structure))}
        self.hooks: dict[str, list[tuple[str, Any]]] = {}
        self.original, self.place = chain.leaving(self._original, rows), {row: i for i, row in enumerate(rows)}
        self.stored = {block.path: self._begin(plan, block) for block, _ in chain.blocks}

    def _begin(self, plan: Plan, block: BlockStructure) -> list[_Stored]:
        """Write what the linears of a block begin with."""
        part, stored = self.part_of[block.path], []
        self.hooks[block.path] = []
        linears = [x for x in block.linears if x.name in plan.linears]

        def begun(linear: Linear) -> tuple[LearnedScale, Tensor, Tensor]:
            with torch.inference_mode(False):
                learned = self._learned_scale(linear, plan.linears[linear.name], part)
                state = learned.begin()
                return learned, state, learned.dense(state[0]).to(self.chain.rows.dtype)

        for linear, (learned, state, weight) in zip(linears, self.pool.stream(begun, linears), strict=True):
            p = plan.linears[linear.name]
            places = (self.file.append(state), self.file.append(weight), self.file.append(learned.scales(state[0])))
            stored.append(_Stored(linear, p, part, *places))
            if p.activations is not None:
                _, static = self.job.quantized(part, p.name, p.weights)
                static = None if static is None else static.to(self.chain.rows.device)
                hook = quantizing_hook(p.activations, static, learned.inputs)
                self.hooks[block.path].append((linear.param.removesuffix(".weight"), hook))
        give_back()
        return stored

    def save_best(self) -> None:
        """Keep the current scales as the best ones."""

        def one(x: _Stored) -> None:
            with torch.inference_mode(False):
                learned = self._learned_scale(x.linear, x.plan, x.part)
                self.file.replace(x.best, learned.scales(self.file[x.state][0]))

        self.pool.map(one, (x for stored in self.stored.values() for x in stored))

    def results(self) -> Iterator[tuple[str, QTensor]]:
        """(linear, it with its best scales) of all planned linears."""
        for x in (x for stored in self.stored.values() for x in stored):
            yield x.plan.name, self._learned_scale(x.linear, x.plan, x.part).with_scales(self.file[x.best])

    def divergence(self, rows: Sequence[int]) -> float:
        """Summed KL divergence from the original model over the tokens of the rows that count, in nats."""
        pieces = self._pieces(rows)
        outputs = self.chain.forward([self.chain.entering(p) for p in pieces], self._quantized)

        def one(pair: tuple[list[int], Tensor]) -> float:
            counted = self._counted(pair[0])
            hidden, original = pair[1].flatten(0, 1)[counted], self._original_of(pair[0])[counted]
            return divergence(self.chain.head, hidden, original, self.chain.vocabulary)

        return sum(self.pool.map(one, zip(pieces, outputs, strict=True)))

    def step(self, rows: Sequence[int], number: int, rate: float) -> None:
        """Step ``number``, from 1, along the gradients of the summed KL divergence of the rows."""
        pieces, kept = self._pieces(rows), self.chain.offloaded()
        outputs = self.chain.forward([self.chain.entering(p) for p in pieces], self._quantized, kept)

        def at_output(pair: tuple[list[int], Tensor]) -> Tensor:
            with torch.inference_mode(False):
                counted, hidden = self._counted(pair[0]), pair[1].flatten(0, 1)
                original = self._original_of(pair[0])[counted]
                gradient = torch.zeros_like(hidden)
                gradient[counted] = divergence_gradient(
                    self.chain.head, hidden[counted], original, self.chain.vocabulary
                )
                return gradient.view_as(pair[1])

        gradients = self.pool.map(at_output, zip(pieces, outputs, strict=True))

        for block in self.chain.backward(kept, gradients, self._learned):
            stored = self.stored[self.chain.blocks[block.number][0].path]
            by_piece = list(block.parameters)
            by_linear = [[x.linear.part(g[x.linear.param]) for g in by_piece] for x in stored]
            self.pool.map(lambda pair: self._update(*pair, number, rate), zip(stored, by_linear, strict=True))

    def _update(self, x: _Stored, gradients: list[Tensor], number: int, rate: float) -> None:
        with torch.inference_mode(False):
            learned = self._learned_scale(x.linear, x.plan, x.part)
            state = learned.step(self.file[x.state], gradients, number, rate)
            self.file.replace(x.state, state)
            self.file.replace(x.weight, learned.dense(state[0]).to(self.chain.rows.dtype))

    def _learned_scale(self, linear: Linear, p: LinearPlan, part: int) -> LearnedScale:
        device = self.chain.rows.device
        q, _ = self.job.quantized(part, p.name, p.weights)
        return LearnedScale(linear, q.to(device), self.job.inputs(part, p.name, p.shape[1], p.rotation).to(device))

    def _pieces(self, rows: Sequence[int]) -> list[list[int]]:
        return [list(rows[slice(*span)]) for span in spans(len(rows), self.chain.rows.tokens)]

    def _counted(self, rows: list[int]) -> Tensor | slice:
        """Which tokens of the rows count."""
        return slice(None) if self.mask is None else self.mask[rows].flatten()

    def _original_of(self, rows: list[int]) -> Tensor:
        return torch.cat([self.original[self.place[row]] for row in rows])

    # ---- blocks on the disk ----------------------------------------------------------------------------------

    def _read(self, part: int, stored: str) -> Tensor:
        """A tensor of the original model, as transforms left it."""
        infos = self.job.part(part)
        info = infos.get(f"{stored.removesuffix('.weight')}:original", infos.get(stored))
        return self.chain.structure.checkpoint.read(stored) if info is None else self.job.read(info)

    @contextmanager
    def _original(self, block: BlockStructure) -> Iterator[nn.Module]:
        part = self.part_of[block.path]
        with self.chain.loaded(block, lambda stored: self._read(part, stored)) as module:
            yield module

    @contextmanager
    def _quantized(self, block: BlockStructure) -> Iterator[nn.Module]:
        part, places = self.part_of[block.path], {f"{x.plan.name}.weight": x.weight for x in self.stored[block.path]}

        def read(stored: str) -> Tensor:
            return self.file[places[stored]] if stored in places else self._read(part, stored)

        with self.chain.loaded(block, read) as module:
            handles = [
                module.get_submodule(path).register_forward_pre_hook(hook) for path, hook in self.hooks[block.path]
            ]
            try:
                yield module
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def _learned(self, block: BlockStructure) -> Iterator[nn.Module]:
        """The quantized block, whose weights get gradients."""
        with self._quantized(block) as module:
            for x in self.stored[block.path]:
                module.get_parameter(x.linear.param).requires_grad_()
            yield module


def blockwise_memory(plan: Plan, structure: ModelStructure, workers: int, batch: int) -> int:
    """Peak bytes.

    These are: the head; a block, gradients of its weights for every piece, hidden states of the batch and their gradients, and
    for each worker either the activations of a piece for the backward pass, or the buffers of one linear's step, or a slice of
    logits. batch: rows of a step
    """
    assert plan.calibration is not None
    length, item, config = plan.calibration.seqlen, getattr(torch, plan.run_dtype).itemsize, structure.text_config
    sizes = {p.name: p.shape[0] * p.shape[1] for p in plan.linears.values()}
    hidden, heads = (int(getattr(config, n, None) or 0) for n in ("hidden_size", "num_attention_heads"))
    pieces = spans(batch, length)
    tokens, scores = pieces[0][1] * length, 4 * heads * length if length <= LONGEST else 0
    vocabulary = int(config.vocab_size)
    head, busy = vocabulary * hidden * item, min(workers, len(pieces))
    passing = 3 * batch * length * hidden * item
    largest, most = max(sizes.values()), max(len(block.linears) for block in structure.blocks)
    moments = [head + passing + busy * slice_bytes(vocabulary, item)]
    moments.append(head + min(workers, most) * (_STEP + item) * largest)  # what the descent begins with
    for block in structure.blocks:
        weights = [x.shape[0] * x.shape[1] for x in block.linears]
        learned = [sizes[x.name] for x in block.linears if x.name in sizes]
        widths = sum(sum(x.shape) for x in block.linears) + 8 * hidden
        active = max(tokens * (2 * widths + scores) * item, _STEP * max(learned, default=0))
        moments.append(head + passing + (sum(weights) + len(pieces) * sum(learned)) * item + busy * active)
    return int(with_fragments(max(moments)))


def blockwise_disk(plan: Plan, structure: ModelStructure, batch: int) -> int:
    """Bytes of temporary files: every dequantized weight; for every scale its factor and two moments (float32), and the best
    one; and hidden states of all rows and of a batch."""
    assert plan.calibration is not None
    hidden, item = int(structure.text_config.hidden_size), getattr(torch, plan.run_dtype).itemsize
    rows = 3 * plan.calibration.count + batch * len(structure.blocks)
    weights = sum(p.shape[0] * p.shape[1] for p in plan.linears.values())
    scales = sum(math.prod(param_shape(p.weights, p.shape)) for p in plan.linears.values())
    return int(weights * item + scales * (3 * 4 + 4) + rows * plan.calibration.seqlen * hidden * item)
