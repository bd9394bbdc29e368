"""Solves the linears of a block. Tasks are cut into slices of rows, solved in parallel, and compared with plain rounding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.statistics import Stats
from qkit.errors import BadCalibration, NumericFailure
from qkit.families.blocks import Linear, LinearGroup
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan, has_static
from qkit.solvers.table import SOLVERS, Solver
from qkit.solvers.task import Task
from qkit.system.parallel import Workers
from qkit.tensor import lowrank
from qkit.tensor.activations import static_scale, storable_scale
from qkit.tensor.formats import Format
from qkit.tensor.layouts.modelopt import exact_amax
from qkit.tensor.lowrank import LowRank
from qkit.tensor.qtensor import Params, QTensor, dequantize, find_params, quantize, shared_amax, weight_sha256
from qkit.tensor.sparse import Sparse, add_, split
from qkit.transforms.state import BlockState

FEW_TOKENS = 32  # an expert that saw fewer is rounded to nearest: its Hessian would be noise
_SLICE_ROWS = 1024  # output rows that are solved as one, at the most; does not depend on the number of workers
_SLICE_VALUES = 3 << 20  # or as many as have this many weights: few long columns cost less than many short ones
LARGEST = 1e18  # magnitude of a weight: sums of squares of float32 end at 3e38
ROUNDS = 2  # how often codes are solved again with a low-rank branch taken out; our choice
_ENERGY_TOKENS = 256  # sampled tokens that errors are measured on


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """The quantized weight of one linear, with its errors.

    error, baseline_error: relative squared output error on sample tokens (of the weights themselves when no rows were run), of
    the result and of plain rounding. static: float32 [1], scale of a static activation format; tokens: number of tokens in the
    group's statistics; recipe: the kept one, where several were compared.
    """

    linear: Linear
    plan: LinearPlan
    qtensor: QTensor
    static: Tensor | None
    error: float
    baseline_error: float
    fallback: str | None
    tokens: int | None
    weight_sha256: str
    recipe: str | None = None

    def entry(self) -> dict[str, Any]:
        """The record of the linear in the journal."""
        sparse, low_rank = self.qtensor.sparse, self.qtensor.low_rank
        return {
            **({} if sparse is None else {"sparse": sparse.nnz}),
            **({} if self.recipe is None else {"recipe": self.recipe, "solver": self.plan.solver}),
            **({} if low_rank is None else {"rank": low_rank.rank}),
            "weight_sha256": self.weight_sha256,
            "error": float(f"{self.error:.6g}"),
            "baseline_error": float(f"{self.baseline_error:.6g}"),
            "fallback": self.fallback,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class _Work:
    """A group to solve. sparse: the outliers taken out of each weight; the task holds the rest."""

    solver: Solver
    task: Task
    sparse: list[Sparse | None]


@dataclass(frozen=True)
class _Slice:
    """Solved rows of one linear, with sums of squares of errors (of the result, of plain rounding) and of outputs."""

    qtensor: QTensor
    error: float
    baseline: float
    energy: float
    fallback: str | None


def uses_inputs(planned: Iterable[LinearPlan], learns: bool) -> bool:
    """Whether inputs of linears are captured before they are solved.

    Not where plain rounding is only the start of learned rounding, which gains nothing from them.
    """
    return not learns or any(SOLVERS[p.solver].needs_hessian or has_static(p) or p.rank for p in planned)


def solve_groups(
    state: BlockState, plan: Plan, groups: Iterable[LinearGroup], stats: dict[str, Stats], pool: Workers
) -> list[LinearResult]:
    """Results of the planned linears of the groups, in order."""
    planned = [g for g in groups if g.linears[0].name in plan.linears]
    static = _static_scales(plan, planned, stats, state.structure.dtype)
    works = pool.map(lambda g: _make_work(state, plan, g, stats.get(g.key)), planned)
    results = _results(plan, planned, works, static, pool)
    with_rank = [i for i, group_results in enumerate(results) if any(r.plan.rank for r in group_results)]
    if with_rank:
        rank_groups, rank_works = [planned[i] for i in with_rank], [works[i] for i in with_rank]
        best = _with_branches([results[i] for i in with_rank], rank_works, pool)
        branches = _weight_branches(best, rank_works, pool)
        for _ in range(ROUNDS):
            reduced = [_without_branches(*pair) for pair in zip(rank_works, branches, strict=True)]
            refitted = _with_branches(_results(plan, rank_groups, reduced, static, pool), rank_works, pool)
            best = [_better_results(*pair) for pair in zip(best, refitted, strict=True)]
            branches = [[r.qtensor.low_rank for r in group_results] for group_results in refitted]
        for i, group_results in zip(with_rank, best, strict=True):
            results[i] = group_results
    return [r for group_results in results for r in group_results]


def _results(
    plan: Plan, planned: list[LinearGroup], works: list[_Work], static: dict[str, Tensor], pool: Workers
) -> list[list[LinearResult]]:
    """Results of every group, by linear, without low-rank parts."""
    slices_of_groups = [(i, spans) for i, work in enumerate(works) for spans in _row_slices(work.task)]
    slices = pool.map(lambda item: _solve(works[item[0]], item[1]), slices_of_groups)
    jobs: list[tuple[Linear, list[_Slice], _Work, int, Tensor | None]] = []
    for i, group in enumerate(planned):
        group_slices = [s for (j, _), s in zip(slices_of_groups, slices, strict=True) if j == i]
        for k, linear in enumerate(group.linears):
            linear_slices = [solved for s in group_slices if (solved := s[k]) is not None]
            jobs.append((linear, linear_slices, works[i], k, static.get(group.key)))
    joined = iter(pool.map(lambda job: _join(plan.linears[job[0].name], *job), jobs))
    return [[next(joined) for _ in group.linears] for group in planned]


def solve_matrix(p: LinearPlan, weight: Tensor, stats: Stats | None, dtype: torch.dtype, pool: Workers) -> LinearResult:
    """The result of one matrix [out, in] outside the blocks, in any float dtype; a slice of it at a time is in float32.

    stats: of its inputs, where there are some; dtype: of the scales
    """
    _refuse_huge(p.name, weight)
    solver = SOLVERS[p.solver]
    prepared = None if solver.prepare is None or stats is None else solver.prepare(stats, p.options)
    task = Task(weights=[weight], fmt=p.weights, dtype=dtype, stats=stats, options=p.options, prepared=prepared)
    work = _Work(solver, replace(task, tokens=None if stats is None else stats.tokens), [None])
    linear = Linear(name=p.name, param="weight", shape=p.shape)
    slices = pool.map(lambda spans: _solve(work, spans)[0], _row_slices(work.task))
    return _join(p, linear, [s for s in slices if s is not None], work, 0, None)


# ---- low-rank parts --------------------------------------------------------------------------------------------
# Codes of the weight are solved, and a branch fits what they leave (LQER). Then the largest directions of the weight itself are
# taken out, codes are solved for the rest (SVDQuant), and the branch is fitted anew to what these leave; and once more, with
# that branch taken out. What errs least on sample tokens is kept for all linears of a group, which may share a scale. On
# tiny-llama at w3a16 and rank 16 the mean relative error of a layer is 0.0053, 0.0040 and 0.0038 after the three, and 0.0051
# and 0.0049 where the branch of the first is taken out.

_Branches = list[LowRank | None]


def _weight_branches(results: list[list[LinearResult]], works: list[_Work], pool: Workers) -> list[_Branches]:
    """For every group, low-rank branches that fit the weights themselves; None for linears without one."""
    jobs = [
        (work, k, r.plan.rank)
        for group_results, work in zip(results, works, strict=True)
        for k, r in enumerate(group_results)
    ]
    branches = iter(pool.map(lambda job: _branch(*job, job[0].task.weights[job[1]]) if job[2] else None, jobs))
    return [[next(branches) for _ in group_results] for group_results in results]


def _without_branches(work: _Work, branches: _Branches) -> _Work:
    """The group with the branches subtracted from its weights."""
    weights_and_branches = zip(work.task.weights, branches, strict=True)
    weights = [w if b is None else w - lowrank.add_(torch.zeros_like(w), b) for w, b in weights_and_branches]
    return replace(work, task=replace(work.task, weights=weights, amax=shared_amax(weights, work.task.fmt)))


def _with_branches(results: list[list[LinearResult]], works: list[_Work], pool: Workers) -> list[list[LinearResult]]:
    """Results with branches that fit the errors of the codes. works: with the full weights, whatever was solved."""
    jobs = [
        (r, work, k) for group_results, work in zip(results, works, strict=True) for k, r in enumerate(group_results)
    ]
    fitted = iter(pool.map(lambda job: _with_branch(*job), jobs))
    return [[next(fitted) for _ in group_results] for group_results in results]


def _with_branch(r: LinearResult, work: _Work, index: int) -> LinearResult:
    """The result with a branch that fits its error. index: of the linear in its group."""
    if not r.plan.rank:
        return r
    task, weight, outliers = work.task, work.task.weights[index], work.sparse[index]
    error = weight - dequantize(replace(r.qtensor, sparse=None))
    branch = _branch(work, index, r.plan.rank, error)
    rest = error.sub_(lowrank.add_(torch.zeros_like(error), branch))
    sample = None if task.stats is None else _energy_sample(task.stats.sample).float()
    total_energy = max(_energy(weight if outliers is None else add_(weight.clone(), outliers), sample), 1e-30)
    return replace(r, qtensor=replace(r.qtensor, low_rank=branch), error=_energy(rest, sample) / total_energy)


def _branch(work: _Work, index: int, rank: int, error: Tensor) -> LowRank:
    """The branch that fits an error, float32 [out, in]. The Hessian of an expert with few tokens is not used: it is noise."""
    stats = work.task.stats
    hessian = stats.hessian if stats is not None and stats.tokens >= FEW_TOKENS else None
    return lowrank.find(error, hessian, rank, work.task.dtype)


def _better_results(first: list[LinearResult], second: list[LinearResult]) -> list[LinearResult]:
    """The results with the smaller error; errors of plain rounding are those of the full weights."""
    if sum(r.error for r in second) >= sum(r.error for r in first):
        return first
    return [replace(b, baseline_error=a.baseline_error) for a, b in zip(first, second, strict=True)]


def _static_scales(
    plan: Plan, groups: list[LinearGroup], stats: dict[str, Stats], dtype: torch.dtype
) -> dict[str, Tensor]:
    """{group key: float32 [1]}, scales of groups with a static activation format.

    Experts of a layer with the same format share one scale, since engines run them as one product. dtype: of the model, in
    which scales are stored.
    """
    peak: dict[str, float] = {}
    share: dict[tuple[str, Format], list[str]] = {}
    for g in groups:
        p = plan.linears[g.linears[0].name]
        if has_static(p) and stats[g.key].tokens == 0 and g.expert is None:
            raise BadCalibration(
                f"no calibration sample reached {g.key}, and scheme {p.scheme} measures its inputs: skip it with a rule, or "
                "use a scheme without static activation scales"
            )
        absmax = stats[g.key].absmax if has_static(p) else None
        if absmax is None or p.activations is None:
            continue
        peak[g.key] = float(absmax.max())
        share.setdefault((g.key if g.expert is None else g.linears[0].param, p.activations), []).append(g.key)
    result: dict[str, Tensor] = {}
    for (_, acts), keys in share.items():
        value = storable_scale(static_scale(max(peak[k] for k in keys), acts), dtype)
        scale = torch.tensor([value], device=stats[keys[0]].mean_square.device)
        result.update(dict.fromkeys(keys, scale))
    return result


def _make_work(state: BlockState, plan: Plan, group: LinearGroup, stats: Stats | None) -> _Work:
    p = plan.linears[group.linears[0].name]
    solver = SOLVERS[p.solver]
    least = FEW_TOKENS if group.expert is not None else 1
    if solver.needs_hessian and (stats is None or stats.tokens < least):
        solver = SOLVERS[
            "rtn"
        ]  # for experts with few tokens, and what no token reaches; the record has the token count
    used_stats = stats if stats is not None and stats.tokens else None
    targets = [state.inputs(group, p.rotation).weight(state.weight(x)) for x in group.linears]
    for x, weight in zip(group.linears, targets, strict=True):
        _refuse_huge(x.name, weight)
    if solver.aim is not None and used_stats is not None:
        targets = solver.aim(targets, used_stats, p.options)
    weights, sparse = [], []
    for x, weight in zip(group.linears, targets, strict=True):
        count = plan.linears[x.name].outliers
        dense, outliers = split(weight, count, state.structure.dtype) if count else (weight, None)
        weights.append(dense)
        sparse.append(outliers)
    amax = shared_amax(weights, p.weights)
    if plan.export == "modelopt" and amax is not None and p.weights.scale == "e4m3":
        amax = exact_amax(amax)
    prepared = None if solver.prepare is None or used_stats is None else solver.prepare(used_stats, p.options)
    tokens = None if stats is None else stats.tokens
    return _Work(
        solver,
        Task(
            weights=weights,
            fmt=p.weights,
            dtype=state.structure.dtype,
            stats=used_stats,
            amax=amax,
            options=p.options,
            prepared=prepared,
            tokens=tokens,
        ),
        sparse,
    )


def _refuse_huge(name: str, weight: Tensor) -> None:
    """Raises NumericFailure for weights whose squared errors would leave the range of float32."""
    largest = float(torch.stack(weight.aminmax()).abs().amax()) if weight.numel() else 0.0  # no copy of the weight
    if not largest <= LARGEST:
        raise NumericFailure(
            f"{name}: its largest weight is {largest:.3g}, expected at most {LARGEST:g}: repair the weight, or keep this layer "
            "in full precision with a rule that skips it"
        )


RowSpans = tuple[tuple[int, int] | None, ...]  # rows of each weight of the group; None: no rows in this slice


def slice_rows(rows: int, columns: int) -> int:
    """Number of output rows in one slice; large weights are cut into at least two slices."""
    limit = max(_SLICE_ROWS, _SLICE_VALUES // columns)
    return min(limit, max(_SLICE_ROWS // 2, -(-rows // 2)))


def _row_slices(task: Task) -> list[RowSpans]:
    """Slices of the rows of a task. Rows with scales of their own are independent of each other, given the factor."""
    if task.fmt.strategy not in ("group", "tensor_group", "channel"):
        return [tuple((0, len(w)) for w in task.weights)]
    ends = list(accumulate(len(w) for w in task.weights))
    count = -(-ends[-1] // slice_rows(ends[-1], task.weights[0].shape[1]))
    cuts = [ends[-1] * i // count for i in range(count + 1)]

    def part(k: int, a: int, b: int) -> tuple[int, int] | None:
        """The rows [a, b) of all weights stacked that lie in weight k."""
        start = ends[k] - len(task.weights[k])
        a, b = max(a, start) - start, min(b, ends[k]) - start
        return (a, b) if a < b else None

    return [tuple(part(k, a, b) for k in range(len(ends))) for a, b in pairwise(cuts)]


def _solve(work: _Work, row_spans: RowSpans) -> list[_Slice | None]:
    task = work.task
    spans = [(w, s, span) for w, s, span in zip(task.weights, work.sparse, row_spans, strict=True) if span is not None]
    weights = [w[a:b].float() for w, _, (a, b) in spans]  # a copy only where the matrix is not float32
    outliers = [None if s is None else s.slice(a, b) for _, s, (a, b) in spans]
    solved = work.solver.solve(replace(task, weights=weights))
    sample = None if task.stats is None else _energy_sample(task.stats.sample).float()
    slices: list[_Slice] = []
    for w, s, q in zip(weights, outliers, solved.qtensors, strict=True):
        error, baseline = (_energy(dequantize(t) - w, sample) for t in (q, _round_to_nearest(w, task)))
        energy = _energy(w if s is None else add_(w.clone(), s), sample)
        slices.append(_Slice(replace(q, sparse=s), error, baseline, energy, solved.fallback))
    remaining = iter(slices)
    return [None if span is None else next(remaining) for span in row_spans]


def _round_to_nearest(w: Tensor, task: Task) -> QTensor:
    """The weight rounded to nearest over the full range: the baseline of every solver."""
    return quantize(w, find_params(w, task.fmt, task.dtype, amax=task.amax), task.fmt)


def _energy_sample(sample: Tensor) -> Tensor:
    return sample[:: max(1, len(sample) // _ENERGY_TOKENS)]


def _energy(w: Tensor, sample: Tensor | None) -> float:
    """Sum of squares of the outputs on sample tokens, or of the weight itself without a sample."""
    return float((w.square() if sample is None else (sample @ w.T).square_()).sum())


def _join(
    plan: LinearPlan, linear: Linear, slices: list[_Slice], work: _Work, index: int, static: Tensor | None
) -> LinearResult:
    """The result of a linear from its slices. index: of the linear in its group."""
    total_energy = max(sum(s.energy for s in slices), 1e-30)
    error, baseline = sum(s.error for s in slices) / total_energy, sum(s.baseline for s in slices) / total_energy
    fallback = slices[0].fallback
    worse = error > baseline  # a solver may be worse than plain rounding on a layer; then plain rounding is kept
    # Rounding cannot fall back to rounding: it only used another scale.
    if worse and error > 1.02 * baseline and plan.solver != "rtn":
        fallback = fallback or f"{plan.solver} was worse than rounding"
    outliers, weight = work.sparse[index], work.task.weights[index]
    tensors = (
        [replace(_round_to_nearest(weight.float(), work.task), sparse=outliers)]
        if worse
        else [s.qtensor for s in slices]
    )
    q = replace(_stack(tensors), sparse=outliers)
    return LinearResult(
        linear=linear,
        plan=plan,
        qtensor=q,
        static=static,
        error=baseline if worse else error,  # of the stored codes
        baseline_error=baseline,
        fallback=fallback,
        tokens=work.task.tokens,
        weight_sha256=weight_sha256(tensors),
    )


def _stack(tensors: list[QTensor]) -> QTensor:
    if len(tensors) == 1:
        return tensors[0]
    params = Params.cat([q.params for q in tensors], dim=0)
    return QTensor(torch.cat([q.codes for q in tensors]), params, tensors[0].format)
