"""Learned rounding of the whole model, once its blocks are done.

Blocks are learned one by one, each against its own outputs, so none accounts for the sum of all errors at the logits. Here the
codes of all linears are learned together. The loss is the KL divergence from the original model's next-token probabilities. It
is an end-to-end stage as in EfficientQAT (arXiv 2407.11062, section 3.3, which learns scales on the loss of a text).

Our choices: only offsets are learned (scales gained nothing), and steps follow the size of gradients, not their sign. So about
one weight in a hundred changes its code: those near the edge between two codes with the largest gradients. Held-out rows decide
which step is kept, so the result is never worse there than before. One block is in memory (``end_to_end_blocks``); where blocks
cannot be run one after another, it is the whole model (``end_to_end_whole``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkit.engine.chain import chain_of, is_chain
from qkit.engine.end_to_end_blocks import BlockwiseModel, blockwise_disk, blockwise_memory
from qkit.engine.end_to_end_whole import WholeModel, whole_memory
from qkit.engine.job import WHOLE, Job
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan
from qkit.rounding.block import LOOKS, held_out
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor.qtensor import weight_sha256

RATE = 1.0e-4  # of the first step, in units of the grid, for a gradient of the size that is usual in its linear


def learn_end_to_end(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> None:
    """Learn the codes of the planned linears of the language model together, and commit them.

    Does nothing where the job has them already, or the plan asks for no steps.
    """
    steps = plan.learning("e2e_steps")
    if not steps or job.stage(WHOLE) is not None:
        return
    progress.start("learned rounding of the whole model", steps)
    with torch.inference_mode(False):
        chain = chain_of(plan, structure, job, pool)
        if chain is None:
            _learn(plan, job, WholeModel(plan, structure, job, pool), steps, progress)
            return
        with chain:
            _learn(plan, job, BlockwiseModel(plan, structure, job, chain), steps, progress)


def _learn(plan: Plan, job: Job, model: BlockwiseModel | WholeModel, steps: int, progress: Progress) -> None:
    assert plan.calibration is not None
    rows, mask = list(range(len(plan.calibration.tokens))), plan.calibration.mask
    first_held = len(rows) - held_out(len(rows))
    held_rows, training_rows = rows[first_held:], rows[:first_held] or rows
    counted = plan.calibration.tokens[first_held:].numel() if mask is None else int(mask[first_held:].sum())
    batch = next(iter(plan.linears.values())).options["batch"]
    first_divergence = best_divergence = model.divergence(held_rows) / counted
    order, queue = torch.Generator().manual_seed(plan.seed), list[int]()
    for number in range(steps):
        if len(queue) < batch:
            queue = torch.randperm(len(training_rows), generator=order).tolist() + queue
        chosen = [queue.pop() for _ in range(min(batch, len(queue)))]
        model.step([training_rows[i] for i in chosen], RATE * (1 - number / steps))
        if (number + 1) % -(-steps // LOOKS) == 0 or number + 1 == steps:
            divergence = model.divergence(held_rows) / counted
            if divergence < best_divergence:
                best_divergence = divergence
                model.save_best()
        progress.step()
    records, tensors, entry = job.records(), dict[str, Tensor](), dict[str, Any]()
    for name, q in model.results():
        tensors[f"{name}:codes"] = q.codes
        entry[name] = {**records[name], "weight_sha256": weight_sha256([q])}
    divergences = {"divergence": [float(f"{first_divergence:.6g}"), float(f"{best_divergence:.6g}")]}
    job.commit(job.finished, tensors, {"stage": WHOLE, "linears": entry, **divergences}, None)


def end_to_end_memory(plan: Plan, structure: ModelStructure, workers: int) -> int:
    """Peak bytes of the end-to-end stage."""
    memory = blockwise_memory if is_chain(plan, structure) else whole_memory
    return memory(plan, structure, workers)


def end_to_end_disk(plan: Plan, structure: ModelStructure) -> int:
    """Bytes that the end-to-end stage writes to the job folder."""
    codes = sum(p.shape[0] * p.shape[1] for p in plan.linears.values())
    return blockwise_disk(plan, structure) if is_chain(plan, structure) else codes
