"""Step-wise detachment: the weights that the loss depends on most get their original values back after quantization.

ReQuant, algorithm 2 (Hu et al., arXiv 2503.01901, section 4): in each of K rounds the post-quantization integral of the
current weights is computed anew, and of the whole model those with the largest |gbar_j (w~_j - w_j)| go to the sparse part,
the codes being left as they are. Its listing leaves open, and our choices are: one ranking over the whole model; what is
kept is the difference w - w~, rounded to 16 bits (where the weight was taken out before, its whole value is replaced).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkit.engine.job import Job
from qkit.engine.original_model import original_model
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan, parts
from qkit.sensitivity.pqi import mean_gradients, weight_shares
from qkit.sensitivity.probes import replacements
from qkit.sensitivity.reference_model import ReferenceModel
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor import sparse
from qkit.tensor.qtensor import QTensor, dequantize, weight_sha256

ROUNDS = 2  # K of the paper, in all its runs
# What limits the ranking is the noise of few tokens, not the rule: on tiny-llama at 3 bits, held-out loss change, 0.05 % of the
# weights put back: 0.0854 before, 0.0820 with 32 rows of 256 tokens, 0.0772 with 128.
ROWS = 128  # calibration rows that the integral is taken over, at the most
POINTS = 2  # of the integral


def repair(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> None:
    """Finds ``plan.significant`` weights and commits the sparse parts of all blocks; does nothing when that is done
    already."""
    if not plan.significant or job.stage("repair") is not None:
        return
    assert plan.calibration is not None
    rows = plan.calibration.first(ROWS)
    original = ReferenceModel(original_model(plan, structure, job), structure, pool)
    targets = {name: r.weight for name, r in replacements(plan, structure, job).items()}
    chosen = {name: torch.empty(0, dtype=torch.int64) for name in targets}
    for k in range(ROUNDS):
        progress.start(f"significant weights, round {k + 1} of {ROUNDS}", POINTS)
        gbar = mean_gradients(original, targets, rows, POINTS, step=progress.step)
        count = plan.significant * (k + 1) // ROUNDS - plan.significant * k // ROUNDS
        scores = {n: weight_shares(original.weight(n), w, gbar.pop(n)).abs_().flatten() for n, w in targets.items()}
        for name, places in chosen.items():
            scores[name][places] = -1.0
        for name, places in largest_scores(scores, count).items():
            chosen[name] = torch.cat((chosen[name], places)).sort().values
            targets[name].view(-1)[places] = original.weight(name).flatten()[places]
    _commit(plan, structure, job, original, chosen)


def largest_scores(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The places of the ``count`` largest of all scores together, {name: int64}; of equal ones the first."""
    best = {n: s.topk(min(count, len(s))) for n, s in scores.items()}
    owner = torch.cat([torch.full((len(b.values),), i) for i, b in enumerate(best.values())])
    order = torch.cat([b.values for b in best.values()]).argsort(descending=True, stable=True)[:count]
    places = torch.cat([b.indices for b in best.values()])
    return {n: places[order][owner[order] == i] for i, n in enumerate(scores)}


def _commit(
    plan: Plan, structure: ModelStructure, job: Job, original: ReferenceModel, chosen: dict[str, Tensor]
) -> None:
    tensors: dict[str, Tensor] = {}
    entry: dict[str, Any] = {}
    records = job.records()
    every = parts(plan, structure)
    for place, name in [(i, x.name) for i, b in enumerate(every) for x in b.linears if x.name in plan.linears]:
        q, _ = job.quantized(place, name, plan.linears[name].weights)
        repaired = detach(q, original.weight(name), chosen[name], structure.dtype)
        if repaired.sparse is None:
            continue
        entry[name] = {**records[name], "sparse": repaired.sparse.nnz, "weight_sha256": weight_sha256([repaired])}
        pieces = sparse.write(repaired.sparse, q.shape)
        tensors.update({f"{name}:{k}": v.contiguous() for k, v in pieces.items()})
    job.commit(job.finished, tensors, {"stage": "repair", "linears": entry}, None)


def detach(q: QTensor, weight: Tensor, places: Tensor, dtype: torch.dtype) -> QTensor:
    """The quantized weight with the original values at ``places`` (int64, flat), which its sparse part adds to the codes."""
    if not len(places):
        return q
    dense = dequantize(replace(q, sparse=None))
    values = (weight.flatten()[places] - dense.flatten()[places]).to(sparse.value_dtype(dtype))
    differing = values != 0  # nothing to put back
    difference = sparse.make(places[differing], values[differing], q.shape)
    return replace(q, sparse=sparse.merge(q.sparse, difference, q.shape))
