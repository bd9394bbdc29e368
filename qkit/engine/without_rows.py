"""Blocks that are quantized from their weights alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

from qkit.calibration.statistics import Rows
from qkit.engine.block_step import BlockStep, Run
from qkit.engine.parts import entry_of
from qkit.engine.solving import LinearResult, solve_groups
from qkit.files.safefile import sha256_file


def quantize_without_rows(run: Run, step: BlockStep, record: dict[str, Any] | None = None) -> None:
    """Quantize a block from its weights alone. One group at a time: float32 copies of a whole block would cost the
    most memory. record: of the rows that enter the next block
    """
    run.progress.start(step.name, len(step.state.block.groups))
    results: list[LinearResult] = []
    for group in step.state.block.groups:
        results += solve_groups(step.state, run.plan, (group,), {}, run.pool)
        run.progress.step()
    run.job.commit(step.place, step.part(results, run.plan), entry_of(results), record)


def pass_by(run: Run, step: BlockStep, rows: Rows) -> Rows:
    """Quantize a block that does not run on the rows; they enter the next one as they are."""
    if step.last:
        quantize_without_rows(run, step)
        return rows
    path, record = run.job.rows_path(step.place + 1), dict[str, Any]()
    shutil.copyfile(rows.path, path)
    original = None
    if rows.original is not None:
        original = run.job.rows_path(step.place + 1, original=True)
        shutil.copyfile(rows.original, original)
        record["original"] = sha256_file(original)
    quantize_without_rows(run, step, record | {"sha256": sha256_file(path), "good": rows.good})
    return replace(rows, path=path, original=original)
