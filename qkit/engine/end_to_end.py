"""End-to-end learning of scales, once all blocks are done.

Linears are solved one by one, so none accounts for the sum of all errors at the logits. Here the scales of all linears are
learned together, and the codes stay. It is the second phase of EfficientQAT (arXiv 2407.11062, section 3.3), which learns on
the loss of a text; here the loss is the KL divergence from the original model's next-token probabilities.

Our choices: Adam learns a factor for each scale, at a rate that rises for an eighth of the steps and then falls to zero.
Held-out rows decide which step is kept, so the result is never worse there than before. Learning codes here, by small steps of
their offsets, gained nothing for codes that GPTQ has moved. One block is in memory (``end_to_end_blocks``); where blocks cannot
be run one after another, it is the whole model (``end_to_end_whole``).
"""

from __future__ import annotations

from collections.abc import Sequence
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

END_TO_END = "end-to-end learning of scales"  # the phase
RATE = 2.0e-3  # of factors, the largest of all steps
BATCH = 4  # calibration rows of a step
_RISING = 8  # one in so many steps is at a rising rate


def learn_end_to_end(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> None:
    """Learn the scales of the planned linears of the language model together, and commit them.

    Does nothing where the job has them already, or the plan asks for no steps.
    """
    steps = plan.learning("e2e_steps")
    if not steps or job.stage(WHOLE) is not None:
        return
    assert plan.calibration is not None
    rows = list(range(len(plan.calibration.tokens)))
    first_held = len(rows) - held_out(len(rows))
    batches, held_rows = _batches(rows[:first_held] or rows, steps, plan.seed), rows[first_held:]
    progress.start(END_TO_END, steps)
    with torch.inference_mode(False):
        chain = chain_of(plan, structure, job, pool)
        if chain is None:
            _learn(plan, job, WholeModel(plan, structure, job, pool), batches, held_rows, progress)
            return
        with chain:
            read = sorted({*held_rows, *(row for batch in batches for row in batch)})
            _learn(plan, job, BlockwiseModel(plan, structure, job, chain, read), batches, held_rows, progress)


def _batches(training_rows: Sequence[int], steps: int, seed: int) -> list[list[int]]:
    """The rows of each step: all rows in a drawn order, then all in another one."""
    order, queue = torch.Generator().manual_seed(seed), list[int]()
    batches = []
    for _ in range(steps):
        if len(queue) < BATCH:
            queue = torch.randperm(len(training_rows), generator=order).tolist() + queue
        batches.append([training_rows[queue.pop()] for _ in range(min(BATCH, len(queue)))])
    return batches


def _learn(
    plan: Plan, job: Job, model: BlockwiseModel | WholeModel, batches: list[list[int]], held_rows: list[int],
    progress: Progress,
) -> None:  # fmt: skip
    assert plan.calibration is not None
    steps, mask = len(batches), plan.calibration.mask
    counted = plan.calibration.tokens[held_rows].numel() if mask is None else int(mask[held_rows].sum())
    first_divergence = best_divergence = model.divergence(held_rows) / counted
    for number, rows in enumerate(batches):
        rate = RATE * min(1, (number + 1) * _RISING / steps) * (1 - number / steps)
        model.step(rows, number + 1, rate)
        if (number + 1) % -(-steps // LOOKS) == 0 or number + 1 == steps:
            divergence = model.divergence(held_rows) / counted
            if divergence < best_divergence:
                best_divergence = divergence
                model.save_best()
        progress.step()
    records, tensors, entry = job.records(), dict[str, Tensor](), dict[str, Any]()
    for name, q in model.results():
        learned = {"scale": q.params.scale, "super_scale": q.params.super_scale}
        tensors.update({f"{name}:{piece}": x for piece, x in learned.items() if x is not None})
        entry[name] = {**records[name], "weight_sha256": weight_sha256([q])}
    divergences = {"divergence": [float(f"{first_divergence:.6g}"), float(f"{best_divergence:.6g}")]}
    job.commit(job.finished, tensors, {"stage": WHOLE, "linears": entry, **divergences}, None)


def end_to_end_tokens(plan: Plan) -> int:
    """Tokens of the end-to-end stage, once for each pass forward that they cost: in a step one, one more on the way back, and
    two for gradients; one of the original model over the rows that are read; and those of the held-out rows."""
    rows = plan.calibration
    assert rows is not None
    held, drawn = held_out(rows.count), plan.learning("e2e_steps") * min(BATCH, rows.count)
    return (4 * drawn + min(drawn + held, rows.count) + (1 + LOOKS) * held) * rows.seqlen


def end_to_end_memory(plan: Plan, structure: ModelStructure, workers: int) -> int:
    """Peak bytes of the end-to-end stage."""
    memory = blockwise_memory if is_chain(plan, structure) else whole_memory
    return memory(plan, structure, workers, BATCH)


def end_to_end_disk(plan: Plan, structure: ModelStructure) -> int:
    """Bytes that the end-to-end stage writes to the job folder."""
    return blockwise_disk(plan, structure, BATCH) if is_chain(plan, structure) else 0
