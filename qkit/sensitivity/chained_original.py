"""The original model with one block in memory at a time, for measures that need weights and gradients of the loss alone.

All rows go through a block before the next is read (``engine.chain``), and sums of gradients are those of one block. So a
profile takes little more memory than the largest block and the two ends of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from qkit.calibration.batches import Batch, batches
from qkit.calibration.dataset import Calibration
from qkit.engine.chain import Chain, Loading, chain_of
from qkit.engine.job import Job
from qkit.families.blocks import BlockStructure
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan
from qkit.rounding.sliced import compared, likelihood_gradient
from qkit.sensitivity.chained_ends import ChainedEnds
from qkit.sensitivity.original import Change
from qkit.sensitivity.reference_model import quantizing
from qkit.sensitivity.units import Unit
from qkit.system.parallel import Workers
from qkit.system.progress import Progress


@contextmanager
def chained_original(
    plan: Plan,
    job: Job,
    structure: ModelStructure,
    units: Sequence[Unit],
    rows: Calibration,
    pool: Workers,
    progress: Progress,
) -> Iterator[ChainedOriginal | None]:
    """The original model of a plan that transforms nothing; None for a model whose blocks cannot be run one after another, or
    whose embeddings are units and more than looked up. rows: that losses are measured on; job: has room for their states"""
    with torch.inference_mode(False):
        chain = chain_of(replace(plan, calibration=rows, run_dtype="float32"), structure, job, pool, torch.float32)
    if chain is None:
        yield None
        return
    with chain:
        pieces = batches(rows, 1)
        ends = ChainedEnds.of(chain, pieces, [x.name for u in units if u.is_end for x in u.linears])
        yield None if ends is None else ChainedOriginal(chain, pieces, ends, progress)


class ChainedOriginal:
    """See ``Original``. pieces: a row each"""

    def __init__(self, chain: Chain, pieces: tuple[Batch, ...], ends: ChainedEnds, progress: Progress) -> None:
        self.chain, self.pieces, self.ends, self.progress = chain, pieces, ends, progress
        self.blocks = {b.path: b for b in chain.structure.blocks}
        self.block_of = {x.name: b.path for b in chain.structure.blocks for x in b.linears}
        self.scored = [b.targets.numel() for b in pieces]
        self.loaded: dict[str, nn.Module] = {}
        self.known: dict[str, Tensor] = {}
        self.leaving = chain.leaving(self._original)

    @cached_property
    def base_loss(self) -> float:
        """Of the original, in nats a scored token."""
        return self._score(
            [x[None] for x in map(self.leaving.__getitem__, range(len(self.pieces)))], self.chain.behind
        )[0]

    def weight(self, name: str) -> Tensor:
        """Of a block that is loaded a view; else the block is read, and its weights are kept until others are asked for."""
        if name not in self.block_of:
            return self.chain.structure.checkpoint.read_finite(f"{name}.weight").float()
        block = self.blocks[self.block_of[name]]
        if block.path in self.loaded:
            return next(x for x in block.linears if x.name == name).view(self.loaded[block.path])
        if name not in self.known:
            with self._original(block) as module:
                self.known = {x.name: x.view(module).clone() for x in block.linears}
        return self.known[name]

    def gradients(self, names: Sequence[str], squares: bool = False) -> Iterator[dict[str, Tensor]]:
        """Those of one block at a time, from the last one on, and then those of the ends of the model."""
        wanted, kept = set(names), self.chain.offloaded()
        self.progress.start("gradients of every block", 2 * len(self.chain.blocks))
        entering = [self.chain.entering([row]) for row in range(len(self.pieces))]
        outputs = self.chain.forward(entering, self._original, kept, self.progress.step)
        weights = [1 / len(self.pieces) if squares else n / sum(self.scored) for n in self.scored]
        slopes = self.chain.pool.map(self._at_output, zip(self.pieces, outputs, strict=True))
        at_inputs: list[Tensor] = []
        for found in self.chain.backward(kept, slopes, self._with_gradients(wanted), self.progress.step):
            block, sums = self.blocks[self.chain.blocks[found.number][0].path], dict[str, Tensor]()
            for weight, by_param in zip(weights, found.parameters, strict=True):
                for param, gradient in by_param.items():
                    term = gradient.square_() if squares else gradient
                    sums.setdefault(param, torch.zeros_like(term)).add_(term, alpha=weight)
            if sums:
                yield {x.name: x.part(sums[x.param]) for x in block.linears if x.name in wanted}
            at_inputs = found.at_inputs
        yield from self.ends.gradients(outputs, at_inputs, weights, squares)

    def _at_output(self, item: tuple[Batch, Tensor]) -> Tensor:
        """The gradient of a row's mean loss at what leaves the last block."""
        shared, hidden = item
        with torch.inference_mode(False), torch.enable_grad():
            batch, leaf = shared.cloned(), hidden.detach().requires_grad_()
            read, targets = batch.scored(leaf).flatten(0, -2), batch.targets.flatten()
            gradient = likelihood_gradient(self.chain.head, read.detach(), targets, self.chain.vocabulary)
            return torch.autograd.grad(read, leaf, gradient / len(targets))[0]

    def changed(self, changes: Sequence[Change]) -> tuple[float, float]:
        """See ``Original``."""
        tables = {n: r.weight for unit, made in changes if unit.is_end for n, r in made().items()}
        by_block: dict[str, list[Change]] = {}
        for change in (c for c in changes if not c[0].is_end):
            by_block.setdefault(self.block_of[change[0].linears[0].name], []).append(change)
        moved = self.ends.moved(tables)
        entering = [self.ends.entering(row, moved) for row in range(len(self.pieces))]
        del moved
        outputs = self.chain.forward(entering, self._replacing(by_block))
        return self._score(outputs, self.ends.behind(tables))

    def _score(self, outputs: Sequence[Tensor], behind: nn.Module) -> tuple[float, float]:
        """The loss of what leaves the last block, and its mean KL divergence from the original. behind: what reads it"""

        def one(row: int) -> tuple[float, float]:
            batch = self.pieces[row]
            ours, original = (batch.scored(x).flatten(0, -2) for x in (outputs[row], self.leaving[row][None]))
            return compared(
                lambda x: self.chain.head(x, behind), ours, self.chain.head, original,
                batch.targets.flatten(), self.chain.vocabulary,
            )  # fmt: skip

        likelihoods, divergences = zip(*self.chain.pool.map(one, range(len(self.pieces))), strict=True)
        return sum(likelihoods) / sum(self.scored), sum(divergences) / sum(self.scored)

    # ---- blocks ----------------------------------------------------------------------------------------------

    @contextmanager
    def _original(self, block: BlockStructure) -> Iterator[nn.Module]:
        with self.chain.loaded(block, self.chain.structure.checkpoint.read_finite) as module:
            self.loaded[block.path] = module
            try:
                yield module
            finally:
                del self.loaded[block.path]

    def _with_gradients(self, wanted: Collection[str]) -> Loading:
        @contextmanager
        def load(block: BlockStructure) -> Iterator[nn.Module]:
            with self._original(block) as module:
                for linear in self.blocks[block.path].linears:
                    if linear.name in wanted:
                        module.get_parameter(linear.param).requires_grad_()
                yield module

        return load

    def _replacing(self, by_block: dict[str, list[Change]]) -> Loading:
        @contextmanager
        def load(block: BlockStructure) -> Iterator[nn.Module]:
            with self._original(block) as module:
                linears, handles = {x.name: x for x in self.blocks[block.path].linears}, []
                for _, made in by_block.get(block.path, ()):
                    for name, r in made().items():
                        linears[name].view(module).copy_(r.weight)
                        if r.activations is not None and linears[name].expert is None:
                            owner = module.get_submodule(linears[name].owner)
                            handles.append(owner.register_forward_pre_hook(quantizing(r)))
                try:
                    yield module
                finally:
                    for handle in handles:
                        handle.remove()

        return load
