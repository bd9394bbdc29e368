"""THE LOOP: block after block, from the shards to committed parts.

It knows no format, no method and no model by name. One block of weights is in memory at a time; what has been
committed is never computed again; rows carry the error made so far into the next block.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qkit import sparse
from qkit.blocks import LANGUAGE, LinearGroup, Sequence
from qkit.calls import Call, OneByOne
from qkit.capture import Rows, Wanted
from qkit.entry import Calls, embed, quantizing
from qkit.errors import NumericFailure, write_failure
from qkit.families.materialize import load_block, plain_tensors, release
from qkit.families.outline import Outline
from qkit.flow import Flow
from qkit.job import Job
from qkit.loading import load
from qkit.parallel import Workers
from qkit.plan import Plan, has_static, sequences
from qkit.qtensor import dequantize
from qkit.solvers.table import SOLVERS
from qkit.solving import Result, solve_groups
from qkit.transforms import BlockState
from qkit.transforms.balance import INPUTS, RATIOS, gradients, ratios
from qkit.transforms.keys import scale_keys
from qkit.transforms.table import BALANCED, TRANSFORMS

MAX_FALLBACKS = 0.05  # share of linears that may fall back before the run counts as failed


class Progress(Protocol):
    """What the loop reports to; raising from ``step`` stops the run at a safe place."""

    def start(self, what: str, total: int) -> None: ...
    def step(self, amount: int = 1) -> None: ...


def run_blocks(plan: Plan, outline: Outline, job: Job, pool: Workers, progress: Progress) -> None:
    """Quantize every block that the job has not committed yet.

    Raises NumericFailure when more than MAX_FALLBACKS of all linears fell back to a simpler method.
    """
    if job.finished == 0:
        for _, stored in outline.outer:  # what is only copied at the end is looked at before hours of work
            outline.checkpoint.read_finite(stored)
    first = 0
    for sequence in sequences(plan, outline):
        if job.finished < first + len(sequence.blocks):
            _run_sequence(plan, outline, sequence, first, job, pool, progress)
        first += len(sequence.blocks)
    _check_fallbacks(plan, job)


def _run_sequence(
    plan: Plan, outline: Outline, sequence: Sequence, first: int, job: Job, pool: Workers, progress: Progress
) -> None:
    """The blocks of the sequence that are left. first: the place of its first block among all of the run."""
    schemes, dtype = plan.schemes, getattr(torch, plan.run_dtype if plan.needs_rows else plan.dtype)
    language, rows = sequence.name == LANGUAGE, None
    if plan.needs_rows and (language or (plan.calibration is not None and plan.calibration.kinds is not None)):
        rows, calls = _rows(plan, outline, sequence, first, job, progress)
    balance = _balance(plan, outline, progress) if rows is not None and language else []
    for block in sequence.blocks[job.finished - first :]:
        name = f"{'' if language else sequence.name + ' '}block {block.index + 1}/{len(sequence.blocks)}"
        state = BlockState(outline, block, load_block(outline, block, dtype))
        state.balance = balance[block.index] if balance else {}
        state.distort = _inputs(plan) == "distort"
        if language:
            for transform in plan.transforms:
                if TRANSFORMS[transform].stage == "load":
                    TRANSFORMS[transform].apply(state, schemes, plan.seed)
            if plan.key_exponents is not None:
                scale_keys(state, plan.key_exponents[block.index])
        if rows is None:
            progress.start(name, len(block.groups))
            results: list[Result] = []
            for group in block.groups:  # one at a time: float32 copies of a whole block would be its largest cost
                results += solve_groups(state, plan, (group,), {}, pool)
                progress.step()
            job.commit(first + block.index, _part(results, state, plan.significant > 0), _entry(results), None)
        else:
            last = block.index + 1 == len(sequence.blocks)
            place = first + block.index
            rows = _with_rows(state, plan, rows, calls[block.index], job, pool, progress, name, place, last)
        release(state.module)


def _balance(plan: Plan, outline: Outline, progress: Progress) -> list[dict[str, float]]:
    """By block, what errors at pictures weigh, where a transform asks for it; the model is loaded whole, in float32."""
    if plan.calibration is None or not set(plan.transforms) & set(BALANCED):
        return []
    progress.start("gradients at pictures and answers", plan.calibration.samples)
    model = load(outline.checkpoint.path, dtype=torch.float32)
    each = plan.recipe["options"].get("ratios", RATIOS[0])
    return ratios(gradients(model, outline, plan.calibration, progress.step, each))


def _with_rows(
    state: BlockState,
    plan: Plan,
    rows: Rows,
    call: Call | OneByOne,
    job: Job,
    pool: Workers,
    progress: Progress,
    name: str,
    index: int,
    last: bool,
) -> Rows:
    """One block with calibration: transform, solve, run the rows on, commit as part ``index``. Gives the rows that leave it."""
    schemes = plan.schemes
    flow = Flow(state.module, state.block, rows, call, pool)
    handles: list[Any] = []
    try:
        record: dict[str, Any] = {}
        if rows.original is not None:
            record["original"] = _originals(state, rows, call, job, pool, progress, name, index)
        for transform in plan.transforms:
            if TRANSFORMS[transform].stage == "stats":
                progress.start(f"{name}, {transform}", len(list(rows.pieces())))
                state.stats = flow.capture(
                    state.block.groups, Wanted(hessian=False, ranges=True), progress.step, keep=False
                )
                TRANSFORMS[transform].apply(state, schemes, plan.seed)
                state.write_back()
        results, handles = _solve_with_rows(state, plan, flow, pool, progress, name)
        if not last:
            progress.start(f"{name}, rows", len(list(rows.pieces())))
            before = rows.original
            rows, digest = flow.leave(job.rows_path(index + 1), progress.step)
            rows.original = None if before is None else job.rows_path(index + 1, original=True)
            record |= {"sha256": digest, "good": rows.good}
        flow.close()
        job.commit(index, _part(results, state, plan.significant > 0), _entry(results), None if last else record)
        return rows
    except OSError as e:
        raise write_failure(job.rows_path(index + 1), e) from e
    finally:
        flow.close()
        for handle in handles:
            handle.remove()


def _originals(
    state: BlockState,
    rows: Rows,
    call: Call | OneByOne,
    job: Job,
    pool: Workers,
    progress: Progress,
    name: str,
    index: int,
) -> str:
    """Look at the inputs of the block in a model that is not quantized, and run these rows on; the sha256 of what leaves it."""
    assert rows.original is not None
    flow = Flow(state.module, state.block, replace(rows, path=rows.original), call, pool)
    try:
        progress.start(f"{name}, original", 2 * len(list(rows.pieces())))
        wanted = Wanted(hessian=False, ranges=True)
        state.originals = flow.capture(state.block.groups, wanted, progress.step, keep=False)
        return flow.leave(job.rows_path(index + 1, original=True), progress.step)[1]
    finally:
        flow.close()


def _rows(
    plan: Plan, outline: Outline, sequence: Sequence, first: int, job: Job, progress: Progress
) -> tuple[Rows, Calls]:
    """The rows that enter the first open block of the sequence (from the job, or computed), and how blocks are called."""
    assert plan.calibration is not None
    path = job.rows_path(job.finished)
    record = job.rows_entering(job.finished) if job.finished > first else None
    progress.start("embed the calibration rows", plan.calibration.samples)
    good = None if record is None else [bool(g) for g in record["good"]]
    rows, calls = embed(plan, outline, job, sequence, path, progress.step, good=good)
    if _inputs(plan) != INPUTS[0]:
        rows.original = job.rows_path(job.finished, original=True)
        if record is None:
            shutil.copyfile(path, rows.original)
    return rows, calls


def _inputs(plan: Plan) -> str:
    """Which inputs the scale searches look at, of INPUTS."""
    return str(plan.recipe["options"].get("inputs", INPUTS[0]))


# ---- one block -------------------------------------------------------------------------------------------------


def _solve_with_rows(
    state: BlockState, plan: Plan, flow: Flow, pool: Workers, progress: Progress, name: str
) -> tuple[list[Result], list[Any]]:
    """Results of all linears, stage after stage, each put in place before the next stage looks at its inputs.

    Also gives the handles of the hooks that quantize activations from here on.
    """
    pieces, results, handles = len(list(flow.rows.pieces())), [], []
    for i, groups in enumerate(flow.stages):
        progress.start(f"{name}, layers {i + 1} of {len(flow.stages)}", 2 * pieces)
        found = solve_groups(state, plan, groups, flow.capture(groups, _wanted(plan, groups), progress.step), pool)
        for r in found:
            r.linear.view(state.module).copy_(dequantize(r.qtensor))
            if r.plan.activations is not None and r.linear.expert is None:
                module = state.module.get_submodule(r.linear.param.removesuffix(".weight"))
                handles.append(module.register_forward_pre_hook(quantizing(r.plan.activations, r.static)))
        flow.solved(groups, progress.step)
        results += found
    return results, handles


def _wanted(plan: Plan, groups: tuple[LinearGroup, ...]) -> Wanted:
    planned = [p for g in groups for x in g.linears if (p := plan.linears.get(x.name))]
    hessian = any(SOLVERS[p.solver].needs_hessian for p in planned)
    return Wanted(hessian, not hessian or any(map(has_static, planned)))  # either tells the energy of every channel


# ---- what a part and a journal entry hold ----------------------------------------------------------------------


def _part(results: list[Result], state: BlockState, originals: bool) -> dict[str, Tensor]:
    """Tensors of a part: '<linear>:<piece>' of what is quantized, and plain tensors by their names.

    originals: also the weights that a transform rewrote, as they were before they were quantized.
    """
    tensors = plain_tensors(state.outline.checkpoint, state.block, state.module)
    planned = {r.plan.name for r in results}
    for linear in state.block.linears:
        if linear.name not in planned:
            name = f"{linear.name}.weight"
            original = state.outline.checkpoint.read(name)
            changed = state.changed.get(linear.name)
            tensors[name] = original if changed is None else changed.to(original.dtype)
    for r in results:
        q = r.qtensor
        changed = state.changed.get(r.plan.name) if originals else None
        pieces = {
            "codes": q.codes,
            "scale": q.params.scale,
            "zero": q.params.zero,
            "global_scale": q.params.global_scale,
            "input_scale": r.static,
            "original": None if changed is None else changed.to(state.outline.dtype),
            **({} if q.sparse is None else sparse.write(q.sparse, q.shape)),
        }
        tensors.update({f"{r.plan.name}:{k}": v.contiguous() for k, v in pieces.items() if v is not None})
    return tensors


def _entry(results: list[Result]) -> dict[str, Any]:
    return {"linears": {r.plan.name: r.entry() for r in results}}


def _check_fallbacks(plan: Plan, job: Job) -> None:
    fell = [(name, record["fallback"]) for name, record in job.records().items() if record["fallback"]]
    if len(fell) > MAX_FALLBACKS * len(plan.linears):
        listed = "; ".join(f"{n} ({why})" for n, why in fell[:5])
        raise NumericFailure(
            f"{len(fell)} of {len(plan.linears)} linears fell back to plain rounding, more than {MAX_FALLBACKS:.0%}: {listed}; "
            f"the parts are kept in {job.path}: use more calibration text, or --method rtn"
        )
