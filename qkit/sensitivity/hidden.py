"""The effect of hidden-state errors on the loss: one matrix for the output of each block.

Where the labels of a token are drawn from the model, its expected loss changes by d^T F d / 2, to second order, as the
hidden state behind a block changes by d; F = E[g g^T], g the gradient of the loss there, is the Fisher matrix of the hidden
state (Martens & Grosse, arXiv 1503.05671, section 3, where it is one of a layer's two factors). An error then counts by its
effect on the loss, and not by its squares.

Ours: one F for all tokens of a block, of few rows, and a share of the identity in it, since directions that these rows
never needed are not free of charge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from qkit.calibration.batches import Batch, InputRows, batches
from qkit.engine.chain import Chain, chain_of
from qkit.engine.job import Job
from qkit.families.structure import ModelStructure
from qkit.files.offload import OffloadedTensors
from qkit.planning.plan import Plan
from qkit.rounding.block import PIECE_TOKENS
from qkit.rounding.sliced import sampled_gradient
from qkit.runtime.loading import load_checkpoint
from qkit.sensitivity.reference_model import ReferenceModel
from qkit.system.memory import give_back
from qkit.system.parallel import Workers
from qkit.system.progress import Progress

ROWS = 16  # calibration rows that the gradients are taken on, at the most
PLAIN = 0.1  # share of the identity
PHASE = "errors weighted by the loss"


def weighing(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> list[Tensor]:
    """The ``roots`` of the original model on the first calibration rows, in float32 and with one block in memory; a model
    whose blocks cannot be run one after another is loaded whole."""
    assert plan.calibration is not None
    rows = plan.calibration.first(ROWS)
    progress.start(PHASE, 2 * len(structure.blocks))
    with torch.inference_mode(False):
        chain = chain_of(replace(plan, calibration=rows, run_dtype="float32"), structure, job, pool)
    if chain is None:
        progress.start(PHASE, len(batches(rows)))
        model = load_checkpoint(structure.checkpoint, torch.float32)
        return roots(ReferenceModel(model, structure, pool), rows, plan.seed, progress.step)
    with chain, torch.inference_mode(False):
        found = chain_roots(chain, batches(rows, PIECE_TOKENS), plan.seed, progress.step)
    give_back()
    return found


def roots(model: ReferenceModel, rows: InputRows, seed: int, step: Callable[[], object] = lambda: None) -> list[Tensor]:
    """The matrix R of each block of the language model, float32 [hidden, hidden], with R R^T = (1 - PLAIN) F + PLAIN I.

    F is scaled to a mean diagonal of one, so that ``d R`` has squares of the size of those of d. seed: of the labels. One
    pass with gradients over all rows.
    """
    paths = [b.path for b in model.structure.blocks]
    sums = dict.fromkeys(paths, torch.zeros((), dtype=torch.float64))
    for gradients in model.output_gradients(rows, paths, seed):
        for path, g in gradients.items():
            sums[path] = sums[path] + (g.T @ g).double()
        step()
    return [_root(sums[path]) for path in paths]


def chain_roots(
    chain: Chain, pieces: tuple[Batch, ...], seed: int, step: Callable[[], object] = lambda: None
) -> list[Tensor]:
    """``roots`` of a chain, block after block. pieces: the rows of the chain, in order"""
    kept = chain.offloaded()
    gradients = gradients_at_end(chain, numbered(pieces), seed, kept, step)
    read, width = chain.structure.checkpoint.read, chain.rows.hidden
    found: dict[int, Tensor] = {}
    for block in chain.backward(kept, gradients, lambda block: chain.loaded(block, read), step):
        total = torch.zeros(width, width, dtype=torch.float64, device=chain.rows.device)
        for product in chain.pool.stream(lambda g: (flat := g.flatten(0, -2)).T @ flat, block.at_outputs):
            total += product.double()
        found[chain.blocks[block.number][0].index] = _root(total)
    return [found[b.index] if b.index in found else torch.eye(width) for b in chain.structure.blocks]


@dataclass(frozen=True)
class Piece:
    """Some rows of a chain as one call. number: of the piece among all; first: index of its first row"""

    number: int
    first: int
    batch: Batch

    @property
    def rows(self) -> int:
        """How many they are."""
        return len(self.batch.ids)


def numbered(pieces: tuple[Batch, ...]) -> list[Piece]:
    """All rows of a chain, in order."""
    firsts = accumulate((len(b.ids) for b in pieces), initial=0)
    return [Piece(number, first, batch) for number, (first, batch) in enumerate(zip(firsts, pieces, strict=False))]


def gradients_at_end(
    chain: Chain, pieces: list[Piece], seed: int, kept: OffloadedTensors, step: Callable[[], object] = lambda: None
) -> list[Tensor]:
    """By piece, the gradient of the summed loss of its scored tokens at what leaves the last block, [rows, length, hidden].

    Labels are drawn from the model. kept: gets what enters each block. The way back is that of ``Chain.backward``.
    """
    read = chain.structure.checkpoint.read
    entering = [chain.entering(range(p.first, p.first + p.rows)) for p in pieces]
    outputs = chain.forward(entering, lambda block: chain.loaded(block, read), kept, step)

    def at_output(pair: tuple[Piece, Tensor]) -> Tensor:
        piece, hidden = pair
        with torch.inference_mode(False), torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            scored = piece.batch.cloned().scored(leaf).flatten(0, -2)
            drawn = torch.Generator().manual_seed(seed + piece.number)
            gradient = sampled_gradient(chain.head, scored.detach(), chain.vocabulary, drawn)
            return torch.autograd.grad(scored, leaf, gradient)[0]

    return chain.pool.map(at_output, zip(pieces, outputs, strict=True))


def _root(f: Tensor) -> Tensor:
    identity = torch.eye(len(f), dtype=f.dtype, device=f.device)
    scale = float(f.diagonal().mean())
    mixed = identity if scale == 0.0 else (1 - PLAIN) * f / scale + PLAIN * identity
    root: Tensor = torch.linalg.cholesky(mixed).float()
    return root


def held_bytes(structure: ModelStructure, hidden: int, chained: bool) -> int:
    """Bytes of the sums and of the result. chained: of ``chain_roots``"""
    if chained:
        return (4 * len(structure.blocks) + 4 * 8) * hidden * hidden
    return (8 + 8 + 4) * hidden * hidden * len(structure.blocks)
