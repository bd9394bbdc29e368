"""The loop: block after block, from the shards to committed parts.

It knows no format, no method and no model by name. One block of weights is in memory at a time; what has been
committed is never computed again; rows carry the error made so far into the next block.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.block_runner import Flow
from qkit.calibration.statistics import Rows
from qkit.engine.auto import best_recipe
from qkit.engine.block_step import Run, Step, load_state, saved_inputs, solve_block
from qkit.engine.entry import Calls, embed
from qkit.engine.fallbacks import check_fallbacks
from qkit.engine.job import Job
from qkit.engine.original_rows import advance_originals
from qkit.engine.parts import entry_of, noticed
from qkit.engine.solving import LinearResult, solve_groups
from qkit.errors import write_failure
from qkit.families.blocks import LANGUAGE, BlockSequence, BlockStructure
from qkit.families.materialize import release
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan, sequences
from qkit.system.parallel import Workers
from qkit.system.progress import Progress

ORIGINAL = {"original_inputs", "original_statistics", "original_outputs"}  # needs of rows of the original model


def run_blocks(
    plan: Plan,
    structure: ModelStructure,
    job: Job,
    pool: Workers,
    progress: Progress,
    given: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Quantize every block that the job has not committed yet.

    given: by need of the plan, for each block of the language model, what a pass of the original model gave for it.
    Raises NumericFailure when too many linears fell back to a simpler method (``fallbacks``).
    """
    if job.finished == 0:
        for _, stored in structure.outer:  # what is only copied at the end is looked at before hours of work
            structure.checkpoint.read_finite(stored)
    run, first = Run(plan=plan, structure=structure, job=job, pool=pool, progress=progress, given=given or {}), 0
    for sequence in sequences(plan, structure):
        if job.finished < first + len(sequence.blocks):
            _run_sequence(run, sequence, first)
        first += len(sequence.blocks)
    check_fallbacks(plan, job)


def _run_sequence(run: Run, sequence: BlockSequence, first: int) -> None:
    """The blocks of the sequence that are left. first: the place of its first block among all of the run."""
    plan, rows = run.plan, None
    on_text = sequence.name == LANGUAGE
    if plan.needs_rows and (on_text or (plan.calibration is not None and plan.calibration.beyond_text)):
        rows, calls = _entering(run, sequence, first)
    for block in sequence.blocks[run.job.finished - first :]:
        step = _step(run, sequence, block, first)
        if rows is None:
            _without_rows(run, step)
        else:
            rows = _with_rows(run, step, rows, calls[block.index])
        release(step.state.module)


def _step(run: Run, sequence: BlockSequence, block: BlockStructure, first: int) -> Step:
    on_text = sequence.name == LANGUAGE
    compared = _is_compared(run, sequence)
    return Step(
        state=load_state(run, block, on_text),
        name=f"{'' if on_text else sequence.name + ' '}block {block.index + 1}/{len(sequence.blocks)}",
        place=first + block.index,
        last=block.index + 1 == len(sequence.blocks),
        learns=run.plan.learns and compared,
        tries=bool(run.plan.tries) and compared,
    )


def _is_compared(run: Run, sequence: BlockSequence) -> bool:
    """Whether what leaves a block is held against the original: not of a tower, whose projector gives rows of another shape."""
    return sequence.name not in {t.name for t in run.structure.towers}


def _entering(run: Run, sequence: BlockSequence, first: int) -> tuple[Rows, Calls]:
    """The rows that enter the first open block of the sequence (from the job, or computed), and how blocks are called."""
    plan, job = run.plan, run.job
    assert plan.calibration is not None
    path = job.rows_path(job.finished)
    record = job.rows_entering(job.finished) if job.finished > first else None
    run.progress.start("embed the calibration rows", plan.calibration.samples)
    good = None if record is None else [bool(g) for g in record["good"]]
    rows, calls = embed(plan, run.structure, job, sequence, path, run.progress.step, good=good)
    beside = ORIGINAL if _is_compared(run, sequence) else ORIGINAL - {"original_outputs"}
    if plan.needs & beside:
        rows.original = job.rows_path(job.finished, original=True)
        if record is None:
            shutil.copyfile(path, rows.original)
    return rows, calls


# ---- one block -------------------------------------------------------------------------------------------------


def _without_rows(run: Run, step: Step) -> None:
    """From its weights alone, one group at a time: float32 copies of a whole block would be its largest cost."""
    run.progress.start(step.name, len(step.state.block.groups))
    results: list[LinearResult] = []
    for group in step.state.block.groups:
        results += solve_groups(step.state, run.plan, (group,), {}, run.pool)
        run.progress.step()
    run.job.commit(step.place, step.part(results, run.plan), entry_of(results), None)


def _with_rows(run: Run, step: Step, rows: Rows, call: Call | OneByOne) -> Rows:
    """With calibration: transform, solve, run the rows on, commit. Gives the rows that leave the block."""
    plan, job, progress = run.plan, run.job, run.progress
    leaving, flow, solved = job.rows_path(step.place + 1), None, None
    try:
        record: dict[str, Any] = {}
        if rows.original is not None:
            record["original"], rows = advance_originals(run, step, rows, call)
        if step.tries:
            step, solved = best_recipe(run, step, rows, call)
        flow = Flow(step.state.module, step.state.block, rows, call, run.pool)
        if solved is None:
            solved = solve_block(run, step, flow, rows, call)
        if not step.last:
            progress.start(f"{step.name}, rows", len(list(rows.pieces())))
            original = rows.original
            rows, digest = flow.leave(leaving, progress.step)
            rows.original = None if original is None else job.rows_path(step.place + 1, original=True)
            record |= {"sha256": digest, "good": rows.good}
        flow.close()
        entry = entry_of(solved.results) | solved.noted | noticed(flow.rows.good, rows.good, flow.beyond)
        job.commit(step.place, step.part(solved.results, plan), entry, None if step.last else record)
        return rows
    except OSError as e:
        raise write_failure(leaving, e) from e
    finally:
        if flow is not None:
            flow.close()
        for handle in [] if solved is None else solved.handles:
            handle.remove()
        for path in saved_inputs(run, step, rows).values():
            path.unlink(missing_ok=True)
