"""THE LOOP: block after block, from the shards to committed parts.

It knows no format, no method and no model by name. One block of weights is in memory at a time; what has been
committed is never computed again; rows carry the error made so far into the next block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkit import sparse
from qkit.activations import quantize_activations
from qkit.blocks import LinearGroup
from qkit.calibration import Calibration
from qkit.capture import Call, Rows, Wanted, enter, merged
from qkit.errors import NumericFailure, write_failure
from qkit.families.materialize import load_block, load_outer, plain_tensors, release, release_outer
from qkit.families.outline import Outline
from qkit.flow import Flow
from qkit.formats import Format
from qkit.job import Job
from qkit.loading import load
from qkit.parallel import Workers
from qkit.plan import Plan, has_static
from qkit.qtensor import dequantize
from qkit.solvers.table import SOLVERS
from qkit.solving import Result, solve_groups
from qkit.transforms import BlockState
from qkit.transforms.balance import gradients, ratios
from qkit.transforms.keys import scale_keys
from qkit.transforms.rotate import rotate_outer
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
    rows: Rows | None = None
    calls: dict[int, Call] = {}
    if job.finished == 0:
        for _, stored in outline.outer:  # what is only copied at the end is looked at before hours of work
            outline.checkpoint.read_finite(stored)
    if plan.needs_rows and job.finished < len(outline.blocks):
        rows, calls = _rows(plan, outline, job, progress)
    schemes, dtype = plan.schemes, getattr(torch, plan.run_dtype if plan.needs_rows else plan.dtype)
    balance = _balance(plan, outline, progress) if rows is not None else []
    for block in outline.blocks[job.finished :]:
        name = f"block {block.index + 1}/{len(outline.blocks)}"
        state = BlockState(outline, block, load_block(outline, block, dtype))
        state.balance = balance[block.index] if balance else {}
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
            job.commit(block.index, _part(results, state, plan.significant > 0), _entry(results), None)
        else:
            last = block.index + 1 == len(outline.blocks)
            rows = _with_rows(state, plan, rows, calls[block.index], job, pool, progress, name, last)
        release(state.module)
    _check_fallbacks(plan, job)


def _balance(plan: Plan, outline: Outline, progress: Progress) -> list[dict[str, float]]:
    """By block, what errors at pictures weigh, where a transform asks for it; the model is loaded whole, in float32."""
    if plan.calibration is None or not set(plan.transforms) & set(BALANCED):
        return []
    progress.start("gradients at pictures and answers", plan.calibration.samples)
    model = load(outline.checkpoint.path, dtype=torch.float32)
    return ratios(gradients(model, outline, plan.calibration, progress.step))


def _with_rows(
    state: BlockState,
    plan: Plan,
    rows: Rows,
    call: Call,
    job: Job,
    pool: Workers,
    progress: Progress,
    name: str,
    last: bool,
) -> Rows:
    """One block with calibration: transform, solve, run the rows on, commit. Gives the rows that leave it."""
    schemes, index = plan.schemes, state.block.index
    flow = Flow(state.module, state.block, rows, call, pool)
    handles: list[Any] = []
    try:
        for transform in plan.transforms:
            if TRANSFORMS[transform].stage == "stats":
                progress.start(f"{name}, {transform}", len(list(rows.pieces())))
                state.stats = flow.capture(
                    state.block.groups, Wanted(hessian=False, ranges=True), progress.step, keep=False
                )
                TRANSFORMS[transform].apply(state, schemes, plan.seed)
                state.write_back()
        results, handles = _solve_with_rows(state, plan, flow, pool, progress, name)
        record = None
        if not last:
            progress.start(f"{name}, rows", len(list(rows.pieces())))
            rows, digest = flow.leave(job.rows_path(index + 1), progress.step)
            record = {"sha256": digest, "good": rows.good}
        flow.close()
        job.commit(index, _part(results, state, plan.significant > 0), _entry(results), record)
        return rows
    except OSError as e:
        raise write_failure(job.rows_path(index + 1), e) from e
    finally:
        flow.close()
        for handle in handles:
            handle.remove()


def _rows(plan: Plan, outline: Outline, job: Job, progress: Progress) -> tuple[Rows, dict[int, Call]]:
    """The rows that enter the first open block (from the job, or computed), and how blocks are called."""
    record, path = job.rows_entering(job.finished), job.rows_path(job.finished)
    if record is None:
        return embed(plan, outline, path, progress)
    rows = _rows_in(plan, outline, path, [bool(g) for g in record["good"]])
    assert plan.calibration is not None
    _load_outer(plan, outline)
    entered = enter(outline.model, outline.family.blocks, plan.calibration.calls())
    seen = [calls for _, calls in (entered if plan.calibration.inputs is not None else [next(entered)])]
    entered.close()
    release_outer(outline)
    return rows, _as_one(plan.calibration, seen, rows.dtype)


def embed(
    plan: Plan, outline: Outline, path: Path, progress: Progress, cache: Any = None
) -> tuple[Rows, dict[int, Call]]:
    """The calibration rows as they enter the first block, written to ``path``, and how blocks are called, with ``cache`` as the
    KV cache if there is one."""
    assert plan.calibration is not None
    calibration, seen = plan.calibration, list[dict[int, Call]]()
    rows = _rows_in(plan, outline, path, [True] * calibration.samples)
    _load_outer(plan, outline)
    progress.start("embed the calibration rows", calibration.samples)
    try:
        with path.open("wb") as f:
            for hidden, calls in enter(outline.model, outline.family.blocks, calibration.calls(), cache):
                whole = nn.functional.pad(hidden.to(rows.dtype), (0, 0, 0, rows.tokens - hidden.shape[1]))
                f.write(whole.contiguous().view(torch.uint8).numpy().reshape(-1).data)
                seen = [*(seen if calibration.inputs is not None else []), calls]
                progress.step()
    except OSError as e:
        raise write_failure(path, e) from e
    release_outer(outline)
    return rows, _as_one(calibration, seen, rows.dtype)


def _as_one(calibration: Calibration, calls: list[dict[int, Call]], dtype: torch.dtype) -> dict[int, Call]:
    """How blocks are called with a batch of rows; rows of a text are all called alike."""
    lengths = [x["input_ids"].shape[1] for x in calibration.inputs or ()]
    one = merged(calls, lengths) if lengths else calls[0]
    return {i: call.to(dtype) for i, call in one.items()}


def _rows_in(plan: Plan, outline: Outline, path: Path, good: list[bool]) -> Rows:
    assert plan.calibration is not None
    count, length = plan.calibration.tokens.shape
    dtype = getattr(torch, plan.run_dtype)
    return Rows(path, count, length, outline.text_config.hidden_size, dtype, good, plan.calibration.kinds)


def _load_outer(plan: Plan, outline: Outline) -> None:
    load_outer(outline)
    if "rotate" in plan.transforms:
        table = outline.family.embeddings + ".weight"
        outline.model.get_parameter(table).data.copy_(rotate_outer(outline, plan.seed)[outline.stored_name(table)])


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


def quantizing(fmt: Format, static: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook of linears: their inputs in that activation format."""
    return lambda _, args: (quantize_activations(args[0], fmt, static), *args[1:])


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
