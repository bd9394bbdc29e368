"""The loop: block after block, from the shards to committed parts.

It names no format, method or model. The weights of one block are in memory at a time. A committed block is never computed
again. Rows carry the errors of finished blocks into the next one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qkit.calibration.block_calls import Call, NotOneAfterAnother, OneByOne
from qkit.calibration.block_runner import BlockRunner
from qkit.calibration.statistics import Rows
from qkit.engine.auto import best_recipe
from qkit.engine.block_step import BlockStep, Run, load_state, saved_inputs, solve_block
from qkit.engine.ends import reads_rows
from qkit.engine.entry import BlockCalls, embed
from qkit.engine.fallbacks import check_fallbacks
from qkit.engine.job import Job
from qkit.engine.kv_scales import cannot_measure
from qkit.engine.original_rows import ORIGINAL, advance_originals
from qkit.engine.parts import RECORDED, entry_of, row_notice
from qkit.engine.recorded import recorded_blocks
from qkit.engine.without_rows import pass_by, quantize_without_rows
from qkit.errors import write_failure
from qkit.families.blocks import LANGUAGE, BlockSequence, BlockStructure
from qkit.families.materialize import release
from qkit.families.structure import ModelStructure
from qkit.files.folder import DENOISER
from qkit.planning.plan import Plan, sequences
from qkit.system.parallel import Workers
from qkit.system.progress import Progress


def run_blocks(
    plan: Plan,
    structure: ModelStructure,
    job: Job,
    pool: Workers,
    progress: Progress,
    original_passes: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Quantize every block that the job has not committed yet.

    original_passes: {need of the plan: one value for each block of the language model}, from passes of the original model.
    Raises NumericFailure when too many linears fell back to a simpler method (``fallbacks``).
    """
    if job.finished == 0:
        for _, stored in structure.outer:  # check tensors that are only copied before hours of work
            structure.checkpoint.read_finite(stored)
    run, first_part = (
        Run(
            plan=plan, structure=structure, job=job, pool=pool, progress=progress, original_passes=original_passes or {}
        ),
        0,
    )
    for sequence in sequences(plan, structure):
        if job.finished < first_part + len(sequence.blocks):
            _run_sequence(run, sequence, first_part)
        first_part += len(sequence.blocks)
    check_fallbacks(plan, job)


def _run_sequence(run: Run, sequence: BlockSequence, first_part: int) -> None:
    """Quantize the remaining blocks of the sequence. first_part: index of the part of its first block."""
    plan, rows = run.plan, None
    with_images = plan.calibration is not None and plan.calibration.beyond_text
    if plan.needs_rows and (sequence.on_text or with_images):
        try:
            rows, calls = _entering_rows(run, sequence, first_part)
        except NotOneAfterAnother as e:
            if plan.kv is not None and plan.static_cache:
                raise cannot_measure(run.structure, str(plan.kv["kind"])) from e
            if not run.structure.is_discovered:
                raise
            _run_recorded(run, sequence, first_part)
            return
        run = run.running_in(rows.dtype)
    for block in sequence.blocks[run.job.finished - first_part :]:
        step = _make_step(run, sequence, block, first_part)
        if rows is None:
            quantize_without_rows(run, step)
        elif block.index not in calls:
            rows = pass_by(run, step, rows)
        else:
            rows = _quantize_with_rows(run, step, rows, calls[block.index])
        release(step.state.module)


def _run_recorded(run: Run, sequence: BlockSequence, first_part: int) -> None:
    """Quantize the remaining blocks on inputs that runs of the whole original model record."""
    for block, rows, calls in recorded_blocks(run, sequence, first_part):
        run = run if rows is None else run.running_in(rows.dtype)
        step = replace(_make_step(run, sequence, block, first_part), last=True, recorded=sequence.name != DENOISER)
        if rows is None or calls is None:
            quantize_without_rows(run, step)
        else:
            _quantize_with_rows(run, step, rows, calls)
        release(step.state.module)


def _make_step(run: Run, sequence: BlockSequence, block: BlockStructure, first_part: int) -> BlockStep:
    on_text = sequence.name == LANGUAGE
    compared = _is_compared(run, sequence)
    return BlockStep(
        state=load_state(run, block, on_text),
        name=f"{'' if on_text else sequence.name + ' '}block {block.index + 1}/{len(sequence.blocks)}",
        place=first_part + block.index,
        last=block.index + 1 == len(sequence.blocks),
        learns=run.plan.learns and compared,
        tries=bool(run.plan.tries) and compared,
    )


def _is_compared(run: Run, sequence: BlockSequence) -> bool:
    """Whether outputs of blocks are compared with the original model. Not in a tower: its projector changes the shape
    of rows.
    """
    return sequence.name not in {t.name for t in run.structure.towers}


def _entering_rows(run: Run, sequence: BlockSequence, first_part: int) -> tuple[Rows, BlockCalls]:
    """Rows that enter the first open block of the sequence (from the job, or computed), and the calls of its blocks."""
    plan, job = run.plan, run.job
    assert plan.calibration is not None
    path = job.rows_path(job.finished)
    record = job.rows_entering(job.finished) if job.finished > first_part else None
    run.progress.start("embed the calibration rows", plan.calibration.samples)
    good = None if record is None else [bool(g) for g in record["good"]]
    rows, calls = embed(plan, run.structure, job, sequence, path, run.progress.step, good=good)
    needs = ORIGINAL if _is_compared(run, sequence) else ORIGINAL - {"original_outputs"}
    if plan.needs & needs:
        rows.original = job.rows_path(job.finished, original=True)
        if record is None:
            shutil.copyfile(path, rows.original)
    return rows, calls


# ---- one block -------------------------------------------------------------------------------------------------


def _quantize_with_rows(run: Run, step: BlockStep, rows: Rows, call: Call | OneByOne) -> Rows:
    """The rows that leave the block, after it was transformed, solved and committed."""
    plan, job, progress = run.plan, run.job, run.progress
    leaving, runner, solved = job.rows_path(step.place + 1), None, None
    try:
        record: dict[str, Any] = {}
        if rows.original is not None:
            record["original"], rows = advance_originals(run, step, rows, call)
        if step.tries:
            step, solved = best_recipe(run, step, rows, call)
        runner = BlockRunner(step.state.module, step.state.block, rows, call, run.pool)
        if solved is None:
            solved = solve_block(run, step, runner, rows, call)
        leaves = not step.last or reads_rows(plan, run.structure, step.state.block)
        if leaves:
            progress.start(f"{step.name}, rows", len(list(rows.pieces())))
            original = rows.original
            rows, digest = runner.leave(leaving, progress.step)
            kept = original is not None and not step.last
            rows.original = job.rows_path(step.place + 1, original=True) if kept else None
            record = record if kept else {}
            record |= {"sha256": digest, "good": rows.good}
        runner.close()
        entry = entry_of(solved.results) | solved.notes | row_notice(runner.rows.good, rows.good, runner.beyond)
        entry |= {RECORDED: True} if step.recorded else {}
        job.commit(step.place, step.part(solved.results, plan), entry, record if leaves else None)
        return rows
    except OSError as e:
        raise write_failure(leaving, e) from e
    finally:
        if runner is not None:
            runner.close()
        for handle in [] if solved is None else solved.handles:
            handle.remove()
        for path in saved_inputs(run, step, rows).values():
            path.unlink(missing_ok=True)
