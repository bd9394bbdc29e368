"""Learned rounding of a block whose linears are solved: the glue between a run and ``rounding.block``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.statistics import Rows
from qkit.engine.solving import LinearResult
from qkit.rounding.block import Settings, reconstruct
from qkit.rounding.learned_weight import LearnedWeight
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor.qtensor import dequantize, weight_sha256
from qkit.transforms.state import BlockState

LOSS_WEIGHTS = (
    "loss_weights"  # a need: float32 [hidden, hidden] for each block, what errors of its outputs are multiplied by
)


def learn_block(
    state: BlockState,
    name: str,
    results: list[LinearResult],
    before: dict[str, Tensor],
    rows: Rows,
    targets: Path,
    call: Call | OneByOne,
    seed: int,
    pool: Workers,
    progress: Progress,
) -> tuple[list[LinearResult], dict[str, Any]]:
    """The results with codes that are learned for the block as a whole, put in place, and what the journal says of it.

    before: the weights that were solved, float32 [out, in], by linear; targets: the rows that leave the block in the original
    model. The hooks that quantize inputs are in force. Errors of single linears in the results stay those of the solver: that
    of the block, a mean square per channel, is what was lowered.
    """
    options = results[0].plan.options
    settings = Settings(options["steps"], options["batch"], options["rate"], seed)
    progress.start(f"{name}, learned rounding", settings.steps)
    group_of = {x.name: g for g in state.block.groups for x in g.linears}
    learners = []
    for r in results:
        inputs = state.inputs(group_of[r.plan.name], r.plan.rotation)
        learners.append(LearnedWeight.of(r.linear, inputs.weight(before[r.plan.name]), r.qtensor, inputs))
    learned, first, last = reconstruct(
        state.module,
        learners,
        rows,
        replace(rows, path=targets),
        call,
        settings,
        pool,
        progress.step,
        state.given.get(LOSS_WEIGHTS),
    )
    put_in_place = []
    for r, x, q in zip(results, learners, learned, strict=True):
        r.linear.view(state.module).copy_(x.inputs.weight_back(dequantize(q)))
        put_in_place.append(replace(r, qtensor=q, weight_sha256=weight_sha256([q])))
    return put_in_place, {"block_error": [float(f"{first:.6g}"), float(f"{last:.6g}")]}
