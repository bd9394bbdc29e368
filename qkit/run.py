"""THE LOOP: block after block, from the shards to committed parts.

It knows no format, no method and no model by name. One block of weights is in memory at a time; what has been
committed is never computed again; rows carry the error made so far into the next block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qkit.activations import quantize_activations, static_scale
from qkit.blocks import Linear, LinearGroup
from qkit.capture import Call, Rows, Stats, advance, capture, enter
from qkit.errors import NumericFailure, write_failure
from qkit.families.materialize import load_block, load_outer, plain_tensors, release, release_outer
from qkit.families.outline import Outline
from qkit.job import Job
from qkit.parallel import Workers
from qkit.plan import LinearPlan, Plan
from qkit.qtensor import QTensor, dequantize, find_params, nvfp4_global_scale, quantize
from qkit.solvers import Task
from qkit.solvers.table import SOLVERS
from qkit.transforms import BlockState
from qkit.transforms.rotate import rotate_outer
from qkit.transforms.table import TRANSFORMS

FEW_TOKENS = 32  # an expert that saw fewer is rounded to nearest: its Hessian would be noise
MAX_FALLBACKS = 0.05  # share of linears that may fall back before the run counts as failed


class Progress(Protocol):
    """What the loop reports to; raising from ``step`` stops the run at a safe place."""

    def start(self, what: str, total: int) -> None: ...
    def step(self, amount: int = 1) -> None: ...


@dataclass(frozen=True)
class Result:
    """What became of one linear. Errors are relative squared output errors on sample tokens (or of the weights
    themselves when no rows were run): of the result, and of plain rounding."""

    plan: LinearPlan
    qtensor: QTensor
    static: Tensor | None
    error: float
    baseline_error: float
    fallback: str | None
    tokens: int | None

    def entry(self) -> dict[str, Any]:
        """The journal's record of it."""
        weight = dequantize(self.qtensor).contiguous()
        return {
            "weight_sha256": hashlib.sha256(weight.numpy().astype("<f4", copy=False).tobytes()).hexdigest(),
            "error": float(f"{self.error:.6g}"),
            "baseline_error": float(f"{self.baseline_error:.6g}"),
            "fallback": self.fallback,
            "tokens": self.tokens,
        }


def run_blocks(plan: Plan, outline: Outline, job: Job, pool: Workers, progress: Progress) -> None:
    """Quantize every block that the job has not committed yet.

    Raises NumericFailure when more than MAX_FALLBACKS of all linears fell back to a simpler method.
    """
    rows, calls = None, {}
    if plan.calibration is not None and job.finished < len(outline.blocks):
        rows, calls = _rows(plan, outline, job, progress)
    schemes = {name: p.pair for name, p in plan.linears.items()}
    for block in outline.blocks[job.finished :]:
        state = BlockState(outline, block, load_block(outline, block))
        for name in plan.transforms:
            if TRANSFORMS[name].stage == "load":
                TRANSFORMS[name].apply(state, schemes, plan.seed)
        if rows is not None:
            progress.start(f"block {block.index + 1}/{len(outline.blocks)}: calibrate", rows.count)
            hessian = any(SOLVERS[p.solver].needs_hessian for x in block.linears if (p := plan.linears.get(x.name)))
            state.stats = capture(state.module, block, rows, calls[block.index], pool, hessian, progress.step)
        for name in plan.transforms:
            if TRANSFORMS[name].stage == "stats":
                TRANSFORMS[name].apply(state, schemes, plan.seed)
        progress.start(f"block {block.index + 1}/{len(outline.blocks)}: solve", len(block.groups))
        results = solve_block(state, plan, pool, progress)
        part = _part(results, state)
        if rows is not None and block.index + 1 < len(outline.blocks):
            progress.start(f"block {block.index + 1}/{len(outline.blocks)}: propagate", rows.count)
            rows = _propagate(state, results, rows, calls[block.index], job.rows_path(block.index + 1), pool, progress)
            job.commit(block.index, part, _entry(results), rows.good)
        else:
            job.commit(block.index, part, _entry(results), None)
        release(state.module)
        del state, results, part
    _check_fallbacks(plan, job)


def _rows(plan: Plan, outline: Outline, job: Job, progress: Progress) -> tuple[Rows, dict[int, Call]]:
    """The rows that enter the first open block (from the job, or computed), and how blocks are called."""
    assert plan.calibration is not None
    tokens, index = plan.calibration.tokens, job.finished
    load_outer(outline)
    if "rotate" in plan.transforms:
        table = outline.family.embeddings + ".weight"
        outline.model.get_parameter(table).data.copy_(
            rotate_outer(outline, plan.seed)[outline.family.stored_name(table)]
        )
    path = job.rows_path(index)
    config: Any = outline.model.config
    rows = Rows(path, len(tokens), tokens.shape[1], config.hidden_size, outline.dtype, [True] * len(tokens))
    record = job.rows_entering(index)
    if record is not None:
        rows.good = [bool(g) for g in record["good"]]
        _, calls = next(enter(outline.model, outline.family.blocks, tokens[:1]))
        calls = dict(calls)
    else:
        progress.start("embed the calibration rows", len(tokens))
        calls = {}
        try:
            with path.open("wb") as f:
                for hidden, seen in enter(outline.model, outline.family.blocks, tokens):
                    f.write(memoryview(hidden.contiguous().view(torch.uint8).numpy().reshape(-1)))
                    calls = seen
                    progress.step()
        except OSError as e:
            raise write_failure(path, e) from e
    release_outer(outline)
    return rows, calls


# ---- one block -------------------------------------------------------------------------------------------------


def solve_block(state: BlockState, plan: Plan, pool: Workers, progress: Progress) -> list[Result]:
    """Results of the planned linears of a block, in order."""
    groups = [g for g in state.block.groups if g.linears[0].name in plan.linears]
    static = _static_scales(state, plan, groups)
    # The widest input first: it takes longest, and the workers end together.
    order = sorted(range(len(groups)), key=lambda i: -groups[i].linears[0].shape[1])
    work: Callable[[int], list[Result]] = lambda i: _solve_group(state, plan, groups[i], static)  # noqa: E731
    solved: dict[int, list[Result]] = {}
    for start in range(0, len(order), pool.count):
        some = order[start : start + pool.count]
        solved.update(zip(some, pool.map(work, some), strict=True))
        progress.step(len(some))
    return [r for i in range(len(groups)) for r in solved[i]]


def _static_scales(state: BlockState, plan: Plan, groups: list[LinearGroup]) -> dict[str, Tensor]:
    """{group key: float32 [1]} of groups whose activation format stores a scale. Experts of a layer share one, as
    engines run them as one product."""
    peak: dict[str, float] = {}
    share: dict[str, list[str]] = {}
    for g in groups:
        acts = plan.linears[g.linears[0].name].activations
        if acts is None or not (acts.strategy == "tensor_group" or not acts.dynamic):
            continue
        peak[g.key] = float(state.stats[g.key].absmax.max())
        share.setdefault(g.key if g.expert is None else g.linears[0].param, []).append(g.key)
    result: dict[str, Tensor] = {}
    for keys in share.values():
        acts = plan.linears[keys[0]].activations
        assert acts is not None
        scale = torch.tensor([static_scale(max(peak[k] for k in keys), acts)])
        result.update(dict.fromkeys(keys, scale))
    return result


def _solve_group(state: BlockState, plan: Plan, group: LinearGroup, static: dict[str, Tensor]) -> list[Result]:
    p = plan.linears[group.linears[0].name]
    stats = state.stats.get(group.key)
    weights = [state.weight(x) for x in group.linears]
    shared = None
    if p.weights.scale == "e4m3":
        shared = nvfp4_global_scale(torch.stack([w.abs().amax() for w in weights]).amax())
    solver, fallback = SOLVERS[p.solver], None
    if solver.needs_hessian and group.expert is not None and stats is not None and stats.tokens < FEW_TOKENS:
        solver = SOLVERS["rtn"]  # the declared policy for starved experts; the token count says so in the record
    seen = stats if stats is not None and stats.tokens else None
    task = Task(weights, p.weights, state.outline.dtype, seen, shared, p.options)
    solved = solver.solve(task)
    fallback = solved.fallback
    results: list[Result] = []
    for linear, w, q in zip(group.linears, weights, solved.qtensors, strict=True):
        plain = quantize(w, find_params(w, p.weights, state.outline.dtype, global_scale=shared), p.weights)
        error, baseline = _error(w, q, seen), _error(w, plain, seen)
        if error > baseline:
            # A solver may lose to plain rounding on a layer; then plain rounding is what is kept.
            q, error = plain, baseline
            fallback = fallback or (f"{p.solver} was worse than rounding" if error > 1.02 * baseline else None)
        results.append(
            Result(
                plan.linears[linear.name], q, static.get(group.key), error, baseline, fallback, stats and stats.tokens
            )
        )
    return results


def _error(w: Tensor, q: QTensor, stats: Stats | None) -> float:
    """Relative squared error of the outputs on the sample tokens; of the weight without a sample."""
    delta = dequantize(q) - w
    if stats is None:
        return float(delta.square().sum() / w.square().sum().clamp_min(1e-30))
    x = stats.sample.float()
    return float((x @ delta.T).square().sum() / (x @ w.T).square().sum().clamp_min(1e-30))


def _propagate(
    state: BlockState, results: list[Result], rows: Rows, call: Call, out: Path, pool: Workers, progress: Progress
) -> Rows:
    """Rows after the block as it will run: quantized weights, and quantized activations where the scheme has them."""
    by_name: dict[str, Linear] = {x.name: x for x in state.block.linears}
    state.write_back()
    handles = []
    for r in results:
        linear = by_name[r.plan.name]
        linear.view(state.module).copy_(dequantize(r.qtensor))
        if r.plan.activations is not None and linear.expert is None:
            module = state.module.get_submodule(linear.param.removesuffix(".weight"))
            handles.append(module.register_forward_pre_hook(_activation_hook(r)))
    try:
        return advance(state.module, rows, call, out, pool, progress.step)
    except OSError as e:
        raise write_failure(out, e) from e
    finally:
        for handle in handles:
            handle.remove()


def _activation_hook(r: Result) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    fmt = r.plan.activations
    assert fmt is not None
    return lambda _, args: (quantize_activations(args[0], fmt, r.static), *args[1:])


# ---- what a part and a journal entry hold ----------------------------------------------------------------------


def _part(results: list[Result], state: BlockState) -> dict[str, Tensor]:
    """Tensors of a part: '<linear>/codes', '/scale', '/zero', '/global_scale', '/input_scale', and plain tensors."""
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
        pieces = {
            "codes": q.codes,
            "scale": q.params.scale,
            "zero": q.params.zero,
            "global_scale": q.params.global_scale,
            "input_scale": r.static,
        }
        tensors.update({f"{r.plan.name}:{k}": v.contiguous() for k, v in pieces.items() if v is not None})
    return tensors


def _entry(results: list[Result]) -> dict[str, Any]:
    return {"linears": {r.plan.name: r.entry() for r in results}}


def _check_fallbacks(plan: Plan, job: Job) -> None:
    fell = [
        (name, record["fallback"])
        for entry in job.entries.values()
        for name, record in entry["linears"].items()
        if record["fallback"]
    ]
    if len(fell) > MAX_FALLBACKS * len(plan.linears):
        listed = "; ".join(f"{n} ({why})" for n, why in fell[:5])
        raise NumericFailure(
            f"{len(fell)} of {len(plan.linears)} linears fell back to plain rounding, more than {MAX_FALLBACKS:.0%}: {listed}; "
            f"the parts are kept in {job.path}: use more calibration text, or --method rtn"
        )
