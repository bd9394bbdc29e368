"""Learned rounding of a solved block: connects a run with ``rounding.block``."""

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

# A need: float32 [hidden, hidden] for each block, by which errors of its outputs are multiplied.
LOSS_WEIGHTS = "loss_weights"


def learn_block(
    state: BlockState,
    name: str,
    results: list[LinearResult],
    original_weights: dict[str, Tensor],
    rows: Rows,
    targets: Path,
    call: Call | OneByOne,
    seed: int,
    pool: Workers,
    progress: Progress,
) -> tuple[list[LinearResult], dict[str, Any]]:
    """Results with learned codes, which the module also holds, and further fields of the block's journal entry.

    original_weights: {linear: float32 [out, in], the weight that was solved}
    targets:          file of the rows that leave the block in the original model

    The hooks that quantize inputs must be active. Errors of single linears remain those of the solver: learning lowers the
    error of the block, a mean square per channel.
    """
    options = results[0].plan.options
    settings = Settings(options["steps"], options["batch"], options["rate"], seed)
    progress.start(f"{name}, learned rounding", settings.steps)
    group_of = {x.name: g for g in state.block.groups for x in g.linears}
    learners = []
    for r in results:
        inputs = state.inputs(group_of[r.plan.name], r.plan.rotation)
        learners.append(LearnedWeight.of(r.linear, inputs.weight(original_weights[r.plan.name]), r.qtensor, inputs))
    learned, first_error, last_error = reconstruct(
        state.module,
        learners,
        rows,
        replace(rows, path=targets),
        call,
        settings,
        pool,
        progress.step,
        state.original_values.get(LOSS_WEIGHTS),
    )
    rounded = []
    for r, x, q in zip(results, learners, learned, strict=True):
        r.linear.view(state.module).copy_(x.inputs.weight_back(dequantize(q)))
        rounded.append(replace(r, qtensor=q, weight_sha256=weight_sha256([q])))
    return rounded, {"block_error": [float(f"{first_error:.6g}"), float(f"{last_error:.6g}")]}
