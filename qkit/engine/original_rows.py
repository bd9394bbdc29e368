"""Calibration rows in the original model, for solvers, transforms and learned rounding that need them."""

from __future__ import annotations

from dataclasses import replace

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.block_runner import BlockRunner
from qkit.calibration.statistics import Rows, StatsRequest
from qkit.engine.block_step import BlockStep, Run, saved_inputs
from qkit.transforms.table import INPUTS

ORIGINAL = {"original_inputs", "original_statistics", "original_outputs"}  # needs of rows of the original model


def advance_originals(run: Run, step: BlockStep, rows: Rows, call: Call | OneByOne) -> tuple[str, Rows]:
    """Run the rows of the original model through the block.

    Gives the sha256 of the rows that leave it, and the rows without those that became non-finite there.
    """
    assert rows.original is not None
    state = step.state
    runner = BlockRunner(state.module, state.block, replace(rows, path=rows.original), call, run.pool)
    try:
        searched = run.plan.inputs != INPUTS[0]
        run.progress.start(f"{step.name}, original", (1 + searched) * len(list(rows.pieces())))
        if searched:
            request = StatsRequest(hessian=False, ranges=True)
            state.originals = runner.capture(state.block.groups, request, run.progress.step, keep=False)
        leaving_path = run.job.rows_path(step.place + 1, original=True)
        leaving_rows, digest = runner.leave(leaving_path, run.progress.step, saved_inputs(run, step, rows))
        return digest, replace(rows, good=leaving_rows.good)
    finally:
        runner.close()
