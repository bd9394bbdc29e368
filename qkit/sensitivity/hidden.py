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

import torch
from torch import Tensor

from qkit.calibration.batches import InputRows, batches
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan
from qkit.runtime.loading import load_checkpoint
from qkit.sensitivity.reference_model import ReferenceModel
from qkit.system.parallel import Workers
from qkit.system.progress import Progress

ROWS = 32  # calibration rows that the gradients are taken on, at the most
PLAIN = 0.1  # share of the identity


def weighing(plan: Plan, structure: ModelStructure, pool: Workers, progress: Progress) -> list[Tensor]:
    """The ``roots`` of the original model on the first calibration rows; the model is loaded whole, in float32."""
    assert plan.calibration is not None
    rows = plan.calibration.first(ROWS)
    progress.start("gradients behind every block", len(batches(rows)))
    model = load_checkpoint(structure.checkpoint, torch.float32)
    return roots(ReferenceModel(model, structure, pool), rows, plan.seed, progress.step)


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


def _root(f: Tensor) -> Tensor:
    identity = torch.eye(len(f), dtype=f.dtype)
    scale = float(f.diagonal().mean())
    mixed = identity if scale == 0.0 else (1 - PLAIN) * f / scale + PLAIN * identity
    root: Tensor = torch.linalg.cholesky(mixed).float()
    return root


def held_bytes(structure: ModelStructure, hidden: int) -> int:
    """Bytes of the sums and of the result."""
    return (8 + 8 + 4) * hidden * hidden * len(structure.blocks)
