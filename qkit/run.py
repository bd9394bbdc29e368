"""THE LOOP: block after block, from the shards to committed parts.

It knows no format, no method and no model by name. One block of weights is in memory at a time; what has been
committed is never computed again; rows carry the error made so far into the next block.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qkit.auto import attempt
from qkit.blocks import LANGUAGE, BlockOutline, BlockSequence, LinearGroup
from qkit.calls import Call, OneByOne
from qkit.capture import Rows, Stats, Wanted
from qkit.catalog import BALANCED, INPUTS
from qkit.entry import Calls, embed, quantizing
from qkit.errors import NumericFailure, write_failure
from qkit.families.materialize import load_block, release
from qkit.families.outline import Outline
from qkit.flow import Flow
from qkit.job import Job
from qkit.learner import Learner
from qkit.loading import load
from qkit.owned import temp_path
from qkit.parallel import Workers
from qkit.parts import entry_of, noticed, part_tensors
from qkit.plan import Plan, has_static, sequences
from qkit.qtensor import dequantize, weight_sha256
from qkit.reconstruct import Settings, held_out, held_out_error, reconstruct
from qkit.solvers import ZERO_INPUTS
from qkit.solvers.table import SOLVERS
from qkit.solving import Result, look_at_inputs, solve_groups
from qkit.transforms import BlockState
from qkit.transforms.balance import gradients, ratios
from qkit.transforms.keys import scale_keys
from qkit.transforms.table import TRANSFORMS

MAX_SILENT = 0.5  # share of linears that may see nothing but zeros: a single one is a property of the model
MAX_FALLBACKS = 0.05  # share of linears that may fall back before the run counts as failed


class Progress(Protocol):
    """What the loop reports to; raising from ``step`` stops the run at a safe place."""

    def start(self, what: str, total: int) -> None: ...
    def step(self, amount: int = 1) -> None: ...


@dataclass(frozen=True)
class _Run:
    """What every step of a run needs."""

    plan: Plan
    outline: Outline
    job: Job
    pool: Workers
    progress: Progress
    weigh: Sequence[Tensor]


@dataclass(frozen=True)
class _Step:
    """One block of it. place: its part of the job; last: of its sequence, so that nothing needs what it gives; learns: whether
    its codes are learned together once its linears are solved; tries: whether several recipes are tried; weigh: what errors of
    what it gives are multiplied by then."""

    state: BlockState
    name: str
    place: int
    last: bool
    learns: bool
    tries: bool
    weigh: Tensor | None = None

    def part(self, results: list[Result], plan: Plan) -> dict[str, Tensor]:
        """The tensors to commit, with weights as transforms left them where a later stage looks at these."""
        return part_tensors(results, self.state, bool(plan.significant or plan.learning("whole")))


def run_blocks(
    plan: Plan, outline: Outline, job: Job, pool: Workers, progress: Progress, weigh: Sequence[Tensor] = ()
) -> None:
    """Quantize every block that the job has not committed yet.

    weigh: by block of the language model, where codes are learned: what errors are multiplied by before they are squared,
    float32 [hidden, hidden]. Raises NumericFailure when more than MAX_FALLBACKS of all linears fell back to a simpler method.
    """
    if job.finished == 0:
        for _, stored in outline.outer:  # what is only copied at the end is looked at before hours of work
            outline.checkpoint.read_finite(stored)
    run, first = _Run(plan, outline, job, pool, progress, weigh), 0
    for sequence in sequences(plan, outline):
        if job.finished < first + len(sequence.blocks):
            _run_sequence(run, sequence, first)
        first += len(sequence.blocks)
    _check_fallbacks(plan, job)


def _run_sequence(run: _Run, sequence: BlockSequence, first: int) -> None:
    """The blocks of the sequence that are left. first: the place of its first block among all of the run."""
    plan, job = run.plan, run.job
    dtype = getattr(torch, plan.run_dtype if plan.needs_rows else plan.dtype)
    language, rows = sequence.name == LANGUAGE, None
    if plan.needs_rows and (language or (plan.calibration is not None and plan.calibration.beyond_text)):
        rows, calls = _rows(run, sequence, first)
    balance = _balance(run) if rows is not None and language else []
    for block in sequence.blocks[job.finished - first :]:
        name = f"{'' if language else sequence.name + ' '}block {block.index + 1}/{len(sequence.blocks)}"
        state = _loaded(run, block, dtype, language)
        state.balance = balance[block.index] if balance else {}
        last = block.index + 1 == len(sequence.blocks)
        weigh = run.weigh[block.index] if run.weigh and language else None
        tries = bool(plan.tries) and not _is_tower(run, sequence)  # these have the first recipe
        step = _Step(state, name, first + block.index, last, plan.learns and not _is_tower(run, sequence), tries, weigh)
        if rows is None:
            _without_rows(run, step)
        else:
            rows = _with_rows(run, step, rows, calls[block.index])
        release(state.module)


def _loaded(run: _Run, block: BlockOutline, dtype: torch.dtype, language: bool) -> BlockState:
    """The block as it is read, with transforms that come before any row."""
    plan, outline = run.plan, run.outline
    state = BlockState(outline, block, load_block(outline, block, dtype))
    state.distort = plan.inputs == "distort"
    state.doubled = {x.name: p.residual for x in block.linears if (p := plan.linears.get(x.name))}
    if language:
        for transform in plan.transforms:
            if TRANSFORMS[transform].stage == "load":
                TRANSFORMS[transform].apply(state, plan.schemes, plan.seed)
        if plan.key_exponents is not None:
            scale_keys(state, plan.key_exponents[block.index])
    return state


def _is_tower(run: _Run, sequence: BlockSequence) -> bool:
    """What leaves a block of these is not compared: a projector's rows leave it in another shape."""
    return sequence.name in {t.name for t in run.outline.towers}


def _balance(run: _Run) -> list[dict[str, float]]:
    """By block, what errors at pictures weigh, where a transform asks for it; the model is loaded whole, in float32."""
    calibration = run.plan.calibration
    if calibration is None or not set(run.plan.transforms) & set(BALANCED):
        return []
    run.progress.start("gradients at pictures and answers", calibration.samples)
    model = load(run.outline.checkpoint.path, dtype=torch.float32)
    return ratios(gradients(model, run.outline, calibration, run.progress.step, run.plan.ratios))


def _rows(run: _Run, sequence: BlockSequence, first: int) -> tuple[Rows, Calls]:
    """The rows that enter the first open block of the sequence (from the job, or computed), and how blocks are called."""
    plan, job = run.plan, run.job
    assert plan.calibration is not None
    path = job.rows_path(job.finished)
    record = job.rows_entering(job.finished) if job.finished > first else None
    run.progress.start("embed the calibration rows", plan.calibration.samples)
    good = None if record is None else [bool(g) for g in record["good"]]
    rows, calls = embed(plan, run.outline, job, sequence, path, run.progress.step, good=good)
    if plan.inputs != INPUTS[0] or plan.compensates or plan.tries or (plan.learns and not _is_tower(run, sequence)):
        rows.original = job.rows_path(job.finished, original=True)
        if record is None:
            shutil.copyfile(path, rows.original)
    return rows, calls


# ---- one block -------------------------------------------------------------------------------------------------


def _without_rows(run: _Run, step: _Step) -> None:
    """From its weights alone, one group at a time: float32 copies of a whole block would be its largest cost."""
    run.progress.start(step.name, len(step.state.block.groups))
    results: list[Result] = []
    for group in step.state.block.groups:
        results += solve_groups(step.state, run.plan, (group,), {}, run.pool)
        run.progress.step()
    run.job.commit(step.place, step.part(results, run.plan), entry_of(results), None)


def _with_rows(run: _Run, step: _Step, rows: Rows, call: Call | OneByOne) -> Rows:
    """With calibration: transform, solve, run the rows on, commit. Gives the rows that leave the block."""
    plan, job, progress = run.plan, run.job, run.progress
    leaving, flow, solved = job.rows_path(step.place + 1), None, None
    try:
        record: dict[str, Any] = {}
        if rows.original is not None:
            record["original"], rows = _originals(run, step, rows, call)
        if step.tries:
            step, solved = _best(run, step, rows, call)
        flow = Flow(step.state.module, step.state.block, rows, call, run.pool)
        if solved is None:
            solved = _solved(run, step, flow, rows, call)
        if not step.last:
            progress.start(f"{step.name}, rows", len(list(rows.pieces())))
            original = rows.original
            rows, digest = flow.leave(leaving, progress.step)
            rows.original = None if original is None else job.rows_path(step.place + 1, original=True)
            record |= {"sha256": digest, "good": rows.good}
        flow.close()
        entry = entry_of(solved.results) | solved.said | noticed(flow.rows.good, rows.good, flow.beyond)
        job.commit(step.place, step.part(solved.results, plan), entry, None if step.last else record)
        return rows
    except OSError as e:
        raise write_failure(leaving, e) from e
    finally:
        if flow is not None:
            flow.close()
        for handle in [] if solved is None else solved.handles:
            handle.remove()
        for path in _saved_inputs(run, step, rows).values():
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Solved:
    """A block's linears, put in place; handles: of the hooks that quantize activations from there on; said: what the journal
    says of the block."""

    results: list[Result]
    handles: list[Any]
    said: dict[str, Any]


def _solved(run: _Run, step: _Step, flow: Flow, rows: Rows, call: Call | OneByOne) -> _Solved:
    """One recipe. rows: those of the flow and, of several recipes, those that none is solved with."""
    plan, state, progress = run.plan, step.state, run.progress
    for transform in plan.transforms:
        if TRANSFORMS[transform].stage == "stats":
            progress.start(f"{step.name}, {transform}", len(list(rows.pieces())))
            state.stats = flow.capture(
                state.block.groups, Wanted(hessian=False, ranges=True), progress.step, keep=False
            )
            TRANSFORMS[transform].apply(state, plan.schemes, plan.seed)
            state.write_back()
    before = {x.name: state.weight(x).clone() for x in state.block.linears} if step.learns else {}
    results, handles = _solve_with_rows(run, step, flow)
    if not step.learns:
        return _Solved(results, handles, {})
    flow.close()
    results, learned = _learn(run, step, flow.rows, call, results, before)
    return _Solved(results, handles, learned)


def _best(run: _Run, step: _Step, rows: Rows, call: Call | OneByOne) -> tuple[_Step, _Solved]:
    """Every recipe of the plan on the block anew, and the one that errs least on held-out rows, put in place again."""
    first_held = rows.count - held_out(rows.count)
    given = replace(rows, good=[good and i < first_held for i, good in enumerate(rows.good)])
    targets = replace(rows, path=run.job.rows_path(step.place + 1, original=True))
    dtype, errors, best = rows.dtype, dict[str, float](), None
    for name, tried in run.plan.tries.items():
        alone = replace(run, plan=attempt(run.plan, tried))
        state = _loaded(alone, step.state.block, dtype, language=True)
        state.balance, state.originals = step.state.balance, step.state.originals
        mine = replace(step, state=state, name=f"{step.name}, {name}")
        flow = Flow(state.module, state.block, given, call, run.pool)
        try:
            solved = _solved(alone, mine, flow, rows, call)
        finally:
            flow.close()
        error = held_out_error(state.module, rows, targets, call, run.pool, step.weigh)
        for handle in solved.handles:
            handle.remove()
        errors[name] = float(f"{error:.6g}")
        if best is None or error < best[0]:
            values = {n: t.clone() for n, t in state.module.state_dict().items()}
            best = error, name, replace(mine, name=step.name), solved, values
    assert best is not None
    _, name, mine, solved, values = best
    mine.state.module.load_state_dict(values)
    results = [replace(r, recipe=name) for r in solved.results]
    said = {**solved.said, "recipe": name, "held_out_errors": errors}
    return mine, _Solved(results, _quantize_inputs(mine.state, results), said)


def _originals(run: _Run, step: _Step, rows: Rows, call: Call | OneByOne) -> tuple[str, Rows]:
    """Look at the inputs of the block in a model that is not quantized, and run these rows on: the sha256 of what leaves it,
    and the rows without those that turned non-finite there."""
    assert rows.original is not None
    state = step.state
    flow = Flow(state.module, state.block, replace(rows, path=rows.original), call, run.pool)
    try:
        searched = run.plan.inputs != INPUTS[0]
        run.progress.start(f"{step.name}, original", (1 + searched) * len(list(rows.pieces())))
        if searched:
            wanted = Wanted(hessian=False, ranges=True)
            state.originals = flow.capture(state.block.groups, wanted, run.progress.step, keep=False)
        leaving = run.job.rows_path(step.place + 1, original=True)
        left, digest = flow.leave(leaving, run.progress.step, _saved_inputs(run, step, rows))
        return digest, replace(rows, good=left.good)
    finally:
        flow.close()


def _saved_inputs(run: _Run, step: _Step, rows: Rows) -> dict[str, Path]:
    """By submodule of the block the file of its inputs in the original model, where solvers look at them. Which rows reach an
    expert may differ between the two, and rows of different shapes are not kept."""
    if not run.plan.compensates or rows.leads:
        return {}
    hooks = {g.hook for g in step.state.block.groups if g.expert is None and g.hook}
    return {h: temp_path(rows.path.parent, f"{h}.original") for h in sorted(hooks)}


def _learn(
    run: _Run, step: _Step, rows: Rows, call: Call | OneByOne, results: list[Result], before: dict[str, Tensor]
) -> tuple[list[Result], dict[str, Any]]:
    """The results with codes that are learned for the block as a whole, put in place, and what the journal says of it.

    before: the weights that were solved, float32 [out, in], by linear; the hooks that quantize inputs are in force. Errors of
    single linears in the results stay those of the solver: that of the block, a mean square per channel, is what was lowered.
    """
    if not results:  # rules leave the whole block as it is
        return results, {}
    plan, state = run.plan, step.state
    options = results[0].plan.options
    settings = Settings(options["steps"], options["batch"], options["rate"], plan.seed + step.place)
    run.progress.start(f"{step.name}, learned rounding", settings.steps)
    group_of = {x.name: g for g in state.block.groups for x in g.linears}
    learners = []
    for r in results:
        inputs = state.inputs(group_of[r.plan.name], r.plan.rotation)
        learners.append(Learner.of(r.linear, inputs.weight(before[r.plan.name]), r.qtensor, inputs))
    targets = replace(rows, path=run.job.rows_path(step.place + 1, original=True))
    learned, first, last = reconstruct(
        state.module, learners, rows, targets, call, settings, run.pool, run.progress.step, step.weigh
    )
    found = []
    for r, x, q in zip(results, learners, learned, strict=True):
        r.linear.view(state.module).copy_(x.inputs.weight_back(dequantize(q)))
        found.append(replace(r, qtensor=q, weight_sha256=weight_sha256([q])))
    return found, {"block_error": [float(f"{first:.6g}"), float(f"{last:.6g}")]}


def _solve_with_rows(run: _Run, step: _Step, flow: Flow) -> tuple[list[Result], list[Any]]:
    """Results of all linears, stage after stage, each put in place before the next stage looks at its inputs.

    Also gives the handles of the hooks that quantize activations from here on.
    """
    plan, state, progress = run.plan, step.state, run.progress
    pieces, results, handles = len(list(flow.rows.pieces())), [], []
    planned = [p for x in state.block.linears if (p := plan.linears.get(x.name))]
    looks = look_at_inputs(planned, step.learns)
    for i, groups in enumerate(flow.stages):
        progress.start(f"{step.name}, layers {i + 1} of {len(flow.stages)}", 2 * pieces)
        inputs = {g.key: state.inputs(g, p.rotation) for g in groups if (p := plan.linears.get(g.linears[0].name))}
        saved, stats = _saved_inputs(run, step, flow.rows), dict[str, Stats]()
        if looks:
            stats = flow.capture(groups, _wanted(plan, groups), progress.step, inputs=inputs, originals=saved)
        own = {x.name: inputs[g.key] for g in groups if g.key in inputs for x in g.linears}
        found = solve_groups(state, plan, groups, stats, run.pool)
        for r in found:
            r.linear.view(state.module).copy_(own[r.plan.name].weight_back(dequantize(r.qtensor)))
        handles += _quantize_inputs(state, found)
        if looks:
            flow.solved(groups, progress.step)
        results += found
    return results, handles


def _quantize_inputs(state: BlockState, results: list[Result]) -> list[Any]:
    """Handles of hooks that do so, of linears that are modules."""
    group_of = {x.name: g for g in state.block.groups for x in g.linears}
    handles = []
    for r in results:
        if r.plan.activations is not None and r.linear.expert is None:
            module = state.module.get_submodule(r.linear.param.removesuffix(".weight"))
            inputs = state.inputs(group_of[r.plan.name], r.plan.rotation)
            handles.append(module.register_forward_pre_hook(quantizing(r.plan.activations, r.static, inputs)))
    return handles


def _wanted(plan: Plan, groups: tuple[LinearGroup, ...]) -> Wanted:
    planned = [p for g in groups for x in g.linears if (p := plan.linears.get(x.name))]
    hessian = any(SOLVERS[p.solver].needs_hessian or p.rank for p in planned)
    return Wanted(hessian, not hessian or any(map(has_static, planned)))  # either tells the energy of every channel


def _check_fallbacks(plan: Plan, job: Job) -> None:
    reasons = {name: record["fallback"] for name, record in job.records().items()}
    silent = [name for name, why in reasons.items() if why == ZERO_INPUTS]
    if len(silent) > MAX_SILENT * len(plan.linears):
        raise NumericFailure(
            f"{len(silent)} of {len(plan.linears)} linears saw nothing but zeros, the first is {silent[0]}; the parts are kept "
            f"in {job.path}: look at the weights of the layers before it, or use --method rtn"
        )
    fell = [(name, why) for name, why in reasons.items() if why and why != ZERO_INPUTS]
    if len(fell) > MAX_FALLBACKS * len(plan.linears):
        listed = "; ".join(f"{n} ({why})" for n, why in fell[:5])
        raise NumericFailure(
            f"{len(fell)} of {len(plan.linears)} linears fell back to plain rounding, more than {MAX_FALLBACKS:.0%}: {listed}; "
            f"the parts are kept in {job.path}: use more calibration text, or --method rtn"
        )
