"""GPTQ: rounds column by column, and later columns compensate the error.

Frantar et al., arXiv 2210.17323, algorithm 1, in the form of LDLQ (Chee et al., arXiv 2307.13304, section 4, which shows
that the two are one). With H = mean x x^T + lambda I = (I + A) D (I + A)^T, A strictly upper triangular and D
diagonal, for each input column k in order:

  q_k = qdq(w_k + sum_{j<k} e_j A_jk),   e_k = w_k - q_k

so that rounding in column k costs D_kk times its square. A and D come from one Cholesky factorization; H^-1, which
algorithm 1 works with, is never formed.

How it is arranged here (our choices):
 * all linears of a group are one problem, their rows stacked: one factorization and one column loop for q/k/v;
 * left-looking: a column receives all earlier errors at once when its turn comes. W is kept as [in, out], so
   a column is contiguous, and the place of a finished column holds its error e_k. Errors reach a panel of
   columns by one matrix product, a sub-panel by a small one, a column by one matrix-vector product;
 * the scale of a group is found when its first column comes up, from the weights as corrected by then, by the
   search of ``qtensor.find_params`` with importance D_kk;
 * ``order: activation`` takes the columns by falling diagonal of H. Scales then come from the original weights,
   so the file needs no permutation;
 * the damping lambda is ``damp`` times the mean diagonal; if the factorization fails it is raised tenfold up to 1,
   then the group is rounded to nearest and the fallback recorded;
 * ``sweeps`` of coordinate descent may follow. First each scale in the model's dtype goes to its least squares, with
   everything else as it is, then every column is rounded once more, with all others as they are (QuantEase, arXiv
   2309.01885, algorithm 1): the same loop, in which a column receives later errors, too. Neither step makes tr(E^T H E)
   larger, E being the errors, but for the order in which float32 adds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.statistics import Stats
from qkit.solvers import rtn
from qkit.solvers.refit import Refit
from qkit.solvers.task import ZERO_INPUTS, Solved, Task
from qkit.tensor.block_params import find_group
from qkit.tensor.formats import Format
from qkit.tensor.qtensor import (
    Params,
    QTensor,
    codes_to_grid,
    effective_minimum,
    effective_scale,
    expand,
    find_params,
    grid_to_codes,
    round_to_grid_,
)

_SUB = 32  # columns of a sub-panel


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A factorized Hessian, with columns in the order in which they are rounded.

    spread: float32 [in, in], I + A: A_jk is the share of the error of column j that column k compensates; None: no factor
    cost:   float32 [in], the diagonal of D; 0 for inputs that were never active
    reason: why there is no factor
    order:  of the columns; None for the natural one
    diagonal: float32 [in], H_kk, 0 for inputs that were never active; None without sweeps
    pull:   float32 [in, in], H_jk / H_kk, 0 for j = k: the share of the error of column j that column k compensates while
            all others stay; None without sweeps
    """

    spread: Tensor | None
    cost: Tensor | None = None
    reason: str | None = None
    order: Tensor | None = None
    diagonal: Tensor | None = None
    pull: Tensor | None = None


def prepare(stats: Stats, options: dict[str, Any]) -> Factor:
    """The factorized Hessian of a group. Options: ``damp`` (float), ``order`` ('none' or 'activation'), ``sweeps`` (int)."""
    assert stats.hessian is not None
    hessian, order = stats.hessian, None
    if options.get("order", "none") == "activation" and _finite(hessian):
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[order][:, order]
    upper, reason = factorize(hessian, float(options.get("damp", 0.01)))
    if upper is None:
        return Factor(spread=None, reason=reason)
    diagonal_weight = pull = None
    if options.get("sweeps", 0):
        diagonal_weight = upper.square().sum(1)  # the damped diagonal, in the units of the factor
        pull = hessian.div(float(hessian.diagonal().double().mean())).div_(diagonal_weight).fill_diagonal_(0)
        diagonal_weight *= hessian.diagonal() != 0  # scales are not for inputs that were never active
    factor_diagonal = upper.diagonal().clone()
    cost = factor_diagonal.square().mul_(
        hessian.diagonal() != 0
    )  # whatever an input that was never active is multiplied with
    return Factor(
        spread=upper.div_(factor_diagonal), cost=cost, reason=None, order=order, diagonal=diagonal_weight, pull=pull
    )


def aim(weights: list[Tensor], stats: Stats, options: dict[str, Any]) -> list[Tensor]:
    """Target weights that compensate the change of their inputs, float32 [out, in] each. Option: ``compensate`` (float, 0 to
    1).

    The inputs x come from quantized layers; the target output is W x', x' being the original input. Least squares give
    W + W E (x' - x) x^T (E x x^T + lambda I)^-1, and GPTQ then quantizes these weights: the objective of GPTAQ
    (arXiv 2504.02692), in a closed form of ours. The share is a damping, also ours, since calibration tokens are few.
    Weights are unchanged where there is no drift, or it is not finite, or the Hessian has no Cholesky factor.
    """
    share = float(options.get("compensate", 0.0))
    if stats.drift is None or stats.hessian is None or not share or not _finite(stats.drift):
        return weights
    damp = float(options.get("damp", 0.01)) * float(stats.hessian.diagonal().double().mean())
    identity = torch.eye(len(stats.hessian), device=stats.hessian.device)
    lower, info = torch.linalg.cholesky_ex(stats.hessian + damp * identity)
    if int(info):
        return weights
    change = torch.cholesky_solve(stats.drift.T, lower).T
    adjusted = [w + share * (w @ change) for w in weights]
    return adjusted if all(map(_finite, adjusted)) else weights


def solve(task: Task) -> Solved:
    """The codes of a group, or of a slice of its rows."""
    assert task.stats is not None
    factor = task.prepared if task.prepared is not None else prepare(task.stats, task.options)
    if factor.spread is None:
        return Solved(rtn.solve(replace(task, stats=None)).qtensors, fallback=factor.reason)
    return Solved(_solve(task, factor))


def _finite(t: Tensor) -> bool:
    """Whether all elements are finite, without the copies that isfinite() makes."""
    return all(bool(x.isfinite()) for x in t.aminmax())


def factorize(hessian: Tensor, damp: float) -> tuple[Tensor | None, str | None]:
    """(R, None) with R R^T proportional to the damped H, R upper triangular, float32 [in, in]; or (None, reason)."""
    if not _finite(hessian):
        return None, "the Hessian is not finite"
    diagonal = hessian.diagonal()
    mean = float(diagonal.double().mean())  # the sum of large float32 values may leave their range
    if mean <= 0 or float(diagonal.min()) < 0:
        return None, ZERO_INPUTS if mean == 0 else "the Hessian has a negative diagonal"
    dead = diagonal.flip(0) == 0  # an input that was never active: no correction goes through it
    while damp <= 1.0:
        # Cholesky gives a lower triangle; with the channels in reverse it is the upper one. Scaled to a mean diagonal of 1,
        # so that neither tiny nor huge activations leave the range of float32.
        reversed_h = hessian.flip(0, 1).div_(mean)
        reversed_h.diagonal().add_(damp + dead.to(hessian.dtype))
        lower, info = torch.linalg.cholesky_ex(reversed_h)
        del reversed_h
        if int(info) == 0 and _finite(lower):
            return lower.flip(0, 1), None
        damp *= 10
    return None, "the Hessian could not be factorized even with full damping"


def _solve(task: Task, factor: Factor) -> list[QTensor]:
    fmt, spread, cost, order = task.fmt, factor.spread, factor.cost, factor.order
    assert spread is not None and cost is not None
    w = torch.cat(task.weights).T.contiguous()  # [in, out]; becomes the errors, column by column
    scales = _Scales(task, cost, order)
    if order is not None:
        w = w[order]
    codes = torch.empty(w.shape, dtype=_code_dtype(fmt), device=w.device)
    panels = _panels(fmt, order is not None)
    if factor.pull is None:
        _pass(w, w, spread, scales, codes, panels, fmt, repeated=False)
    else:
        original = w.clone()
        _pass(original, w, spread, scales, codes, panels, fmt, repeated=False)
        for _ in range(int(task.options["sweeps"])):
            scales.refit(original, w, codes, factor)
            _pass(original, w, factor.pull, scales, codes, panels, fmt, repeated=True)
        if fmt.gguf:
            scales.refit(original, w, codes, factor)
    codes = codes if order is None else codes[torch.argsort(order)]
    per_weight = codes.T.split([len(x) for x in task.weights])
    return [QTensor(c.contiguous(), p, fmt) for c, p in zip(per_weight, scales.params(), strict=True)]


def _pass(
    original: Tensor,
    w: Tensor,
    spread: Tensor,
    scales: _Scales,
    codes: Tensor,
    panels: tuple[int, int],
    fmt: Format,
    *,
    repeated: bool,
) -> None:
    """Quantize all columns: w [in, out] becomes their errors, codes is filled. repeated: w has errors of an earlier pass."""
    columns, (panel, sub) = len(w), panels
    for p0 in range(0, columns, panel):
        p1 = min(p0 + panel, columns)
        corrected = torch.addmm(
            original[p0:p1], spread[:p0, p0:p1].T, w[:p0]
        )  # the weights, corrected by the errors so far
        if repeated:  # and by those that are later
            corrected.addmm_(spread[p1:, p0:p1].T, w[p1:]).addmm_(spread[p0:p1, p0:p1].tril(-1).T, w[p0:p1])
            w[p0:p1] = original[p0:p1]
        for s0 in range(p0, p1, sub):
            s1 = min(s0 + sub, p1)
            corrected[s0 - p0 : s1 - p0].addmm_(spread[p0:s0, s0:s1].T, w[p0:s0])
            scale, zero = scales.columns(corrected[s0 - p0 :], s0, s1)
            _sub_panel(corrected[s0 - p0 : s1 - p0], w[s0:s1], spread[s0:s1, s0:s1], scale, zero, codes[s0:s1], fmt)


def _sub_panel(
    corrected: Tensor, w: Tensor, spread: Tensor, scale: Tensor, zero: Tensor | None, codes: Tensor, fmt: Format
) -> None:
    """Quantize some columns; all tensors are [n, out], but spread is [n, n].

    corrected has the columns with the errors of earlier ones compensated; w has the original columns and becomes their errors;
    codes is filled.
    """
    grid = torch.empty_like(corrected)
    errors, spread_rows = w.T, spread.T
    # Few and in-place operations: a column is short, and their number is what this loop costs.
    columns = zip(corrected.unbind(), w.unbind(), scale.unbind(), grid.unbind(), strict=True)
    for k, (column, error, s, values) in enumerate(columns):
        if k:
            column.addmv_(errors[:, :k], spread_rows[k, :k])
        torch.div(column, s, out=values)
        if zero is None:
            round_to_grid_(values, fmt)
            error.addcmul_(values, s, value=-1)
        else:
            round_to_grid_(values.add_(zero[k]), fmt)
            error.addcmul_(values - zero[k], s, value=-1)
    codes.copy_(grid_to_codes(grid, fmt))


def _code_dtype(fmt: Format) -> torch.dtype:
    return {"fp4": torch.uint8, "fp8": torch.float8_e4m3fn}.get(fmt.kind, torch.int8)


def _panels(fmt: Format, ordered: bool) -> tuple[int, int]:
    """(panel, sub-panel) widths, such that a scale group never straddles a boundary at which scales are found."""
    group = fmt.span
    if group is None or ordered:
        return 128, _SUB
    if fmt.scale == "super":
        return group, fmt.group or _SUB
    return (group, _SUB) if group > _SUB else (group * max(1, 128 // group), group)


def real_zero(p: Params, scale: Tensor) -> Tensor | None:
    """The number, float32 [R, C], that is subtracted from codes before they are scaled: a zero point, or the minimum in units
    of the scale; None for formats without either."""
    if p.zero is not None:
        return p.zero.to(torch.float32)
    minimum = effective_minimum(p)
    return None if minimum is None else -minimum / scale


class _Scales:
    """Scales of the columns, computed at the start of each group, or before the first one."""

    def __init__(self, task: Task, cost: Tensor, order: Tensor | None) -> None:
        self.task = task
        self.cost = cost
        self.sizes = [len(x) for x in task.weights]
        self.live = task.fmt.group is not None and order is None
        self.params_by_weight: list[list[Params]] = [[] for _ in task.weights]
        self.current_scale: tuple[Tensor, Tensor | None] | None = None
        self.fixed: tuple[Tensor, Tensor | None] | None = None
        if not self.live:
            # In the order of the columns of the weights; the cost of a column travels with it.
            natural = cost if order is None else torch.empty_like(cost).scatter_(0, order, cost)
            self.params_by_weight = [[self._find(x, natural)] for x in task.weights]
            scale, zero = self._per_element(
                [f[0] for f in self.params_by_weight], [(len(x), x.shape[1]) for x in task.weights]
            )
            self.fixed = (scale, zero) if order is None else (scale[order], None if zero is None else zero[order])

    def _find(self, w: Tensor, cost: Tensor) -> Params:
        t = self.task
        signed = bool(t.options.get("signed", False))
        return find_params(w, t.fmt, t.dtype, importance=cost, search=True, amax=t.amax, signed=signed)

    def _per_element(self, params: list[Params], shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of every element, [in, out], float32."""
        fmt = self.task.fmt

        def spread(values: list[Tensor]) -> Tensor:
            elements = [expand(v, fmt, s).expand(s) for v, s in zip(values, shapes, strict=True)]
            return torch.cat(elements).T.contiguous()

        scales = [effective_scale(p, fmt) for p in params]
        zeros = [z for p, scale in zip(params, scales, strict=True) if (z := real_zero(p, scale)) is not None]
        return spread(scales), spread(zeros) if zeros else None

    def columns(self, corrected: Tensor, s0: int, s1: int) -> tuple[Tensor, Tensor | None]:
        """(scale, zero) of columns [s0, s1), float32 [s1 - s0, out]. corrected: the rest of the panel, corrected up to s0."""
        if self.fixed is not None:
            scale, zero = self.fixed
            return scale[s0:s1], None if zero is None else zero[s0:s1]
        span = self.task.fmt.span
        assert span is not None
        if s0 % span == 0:
            width = min(span, len(corrected))
            group_weights = corrected[:width].T.contiguous().split(self.sizes)
            params = [self._find(x, self.cost[s0 : s0 + width]) for x in group_weights]
            for found_params, p in zip(self.params_by_weight, params, strict=True):
                found_params.append(p)
            self.current_scale = self._per_element(params, [(len(x), width) for x in group_weights])
        elif self.task.fmt.scale == "super":
            self._regroup(corrected, s0, s1)
        assert self.current_scale is not None
        scale, zero = self.current_scale
        some = slice(s0 % span, s0 % span + s1 - s0)
        return scale[some], None if zero is None else zero[some]

    def _regroup(self, corrected: Tensor, s0: int, s1: int) -> None:
        """Find the small integers of a K type's group anew, now that its weights are corrected; super-scales stay."""
        assert self.current_scale is not None
        fmt, span = self.task.fmt, self.task.fmt.span or 1
        weights = corrected[: s1 - s0].T.contiguous().split(self.sizes)
        blocks = [found_params[-1] for found_params in self.params_by_weight]
        params = [find_group(x, fmt, self.cost[s0:s1], p) for x, p in zip(weights, blocks, strict=True)]
        place = s0 % span // (s1 - s0)
        for p, found in zip(blocks, params, strict=True):
            p.scale[:, place] = found.scale[:, 0]
            if p.minimum is not None and found.minimum is not None:
                p.minimum[:, place] = found.minimum[:, 0]
        some = slice(s0 % span, s0 % span + s1 - s0)
        scale, zero = self._per_element(params, [(len(x), s1 - s0) for x in weights])
        self.current_scale[0][some] = scale
        if zero is not None and self.current_scale[1] is not None:
            self.current_scale[1][some] = zero

    def refit(self, original: Tensor, errors: Tensor, codes: Tensor, factor: Factor) -> None:
        """Set each scale to its least-squares value, rounded to the model's dtype, one group of columns after another.

        errors [in, out] are updated, and these scales are used from then on. 8-bit scales stay: their grid is too coarse.

        Let v be the codes of a group in one row of the weight, less their zero, e the errors of the row and H_g the rows of H
        that are the group's: (e - d v)^T H (e - d v) is least at d = v^T H_g e / v^T H_gg v.
        """
        assert factor.diagonal is not None and factor.pull is not None
        params = self.params()
        if self.task.fmt.gguf and self.task.fmt.scale in ("f16", "super"):  # others are powers of two and FP8, and stay
            self._refit_gguf(params, errors, codes, factor)
            return
        if self.fixed is None:
            self.fixed = self._per_element(params, [(len(x), x.shape[1]) for x in self.task.weights])
        fmt = self.task.fmt
        if fmt.scale == "model" and fmt.strategy in ("group", "channel"):
            natural = (
                torch.arange(len(errors), device=errors.device) if factor.order is None else torch.argsort(factor.order)
            )
            scales_of_columns, refitted = self.fixed[0].clone(), []
            for group in natural.split(fmt.group or len(errors)):
                diagonal, pull = factor.diagonal[group, None], factor.pull[:, group]
                scale, e = scales_of_columns[group[0]], errors[group]
                v = (original[group] - e) / scale
                slope = (v * diagonal * (pull.T @ errors + e)).sum(0)
                curve = (v * diagonal * (pull[group].T @ v + v)).sum(0)
                new_scale = (
                    (scale + slope / curve.clamp_min(torch.finfo(torch.float32).tiny))
                    .to(self.task.dtype)
                    .to(torch.float32)
                )
                new_scale = torch.where(new_scale.isfinite() & (new_scale * scale > 0), new_scale, scale)
                errors[group] = e - v * (new_scale - scale)
                scales_of_columns[group] = new_scale
                refitted.append(new_scale)
            scales_by_weight = torch.stack(refitted, dim=1).to(self.task.dtype).split(self.sizes)
            params = [replace(p, scale=s.contiguous()) for p, s in zip(params, scales_by_weight, strict=True)]
            self.fixed = scales_of_columns, self.fixed[1]
        self.params_by_weight = [[p] for p in params]

    def _refit_gguf(self, params: list[Params], errors: Tensor, codes: Tensor, factor: Factor) -> None:
        """The same for types of GGUF (``refit``)."""
        assert factor.diagonal is not None and factor.pull is not None
        fmt, order = self.task.fmt, factor.order
        natural = slice(None) if order is None else torch.argsort(order)
        ordered = errors[natural].contiguous()
        pull = factor.pull[natural][:, natural]
        grid = codes_to_grid(codes[natural], fmt)
        refit = Refit(Params.cat(params, dim=0), fmt, grid, ordered, factor.diagonal[natural], pull)
        params = refit.run().split(self.sizes)
        errors.copy_(ordered if order is None else ordered[order])
        self.params_by_weight = [[p] for p in params]
        scale, zero = self._per_element(params, [(len(x), x.shape[1]) for x in self.task.weights])
        self.fixed = (scale, zero) if order is None else (scale[order], None if zero is None else zero[order])

    def params(self) -> list[Params]:
        """The params of each weight, groups side by side."""
        return [Params.cat(found_params, dim=1) for found_params in self.params_by_weight]
