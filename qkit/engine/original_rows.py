"""The same rows in a model that is not quantized, beside those of a run, where a solver, a transform or learned rounding needs
them."""

from __future__ import annotations

from dataclasses import replace

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.block_runner import Flow
from qkit.calibration.statistics import Rows, StatsRequest
from qkit.engine.block_step import Run, Step, saved_inputs
from qkit.transforms.table import INPUTS


def advance_originals(run: Run, step: Step, rows: Rows, call: Call | OneByOne) -> tuple[str, Rows]:
    """Look at the inputs of the block in a model that is not quantized, and run these rows on: the sha256 of what leaves it,
    and the rows without those that turned non-finite there."""
    assert rows.original is not None
    state = step.state
    flow = Flow(state.module, state.block, replace(rows, path=rows.original), call, run.pool)
    try:
        searched = run.plan.inputs != INPUTS[0]
        run.progress.start(f"{step.name}, original", (1 + searched) * len(list(rows.pieces())))
        if searched:
            wanted = StatsRequest(hessian=False, ranges=True)
            state.originals = flow.capture(state.block.groups, wanted, run.progress.step, keep=False)
        leaving = run.job.rows_path(step.place + 1, original=True)
        left, digest = flow.leave(leaving, run.progress.step, saved_inputs(run, step, rows))
        return digest, replace(rows, good=left.good)
    finally:
        flow.close()
