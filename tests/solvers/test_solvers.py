"""Solvers against a slow reference in float64, against each other, and on hostile statistics."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qkit.calibration.statistics import Stats
from qkit.solvers.gptq import solve as gptq
from qkit.solvers.rtn import solve as rtn
from qkit.solvers.table import SOLVERS
from qkit.solvers.task import Task
from qkit.tensor.formats import FORMATS, Format
from qkit.tensor.qtensor import dequantize, effective_scale, expand, find_params, nvfp4_global_scale, shared_amax

COLUMNS = 128
SMALL = {name: fmt.with_group(32) if fmt.group == 128 else fmt for name, fmt in FORMATS.items()}


def inputs(columns: int = COLUMNS, tokens: int = 600, seed: int = 0) -> torch.Tensor:
    """Correlated activations [tokens, columns] with a few strong channels."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + 0.3 * torch.randn(columns, 1, generator=g)
    x = torch.randn(tokens, columns, generator=g) @ mix.T
    return x * torch.exp(0.7 * torch.randn(columns, generator=g))


def stats_of(x: torch.Tensor, hessian: torch.Tensor | None = None) -> Stats:
    return Stats(
        tokens=len(x),
        mean_square=x.square().mean(0),
        sample=x[::4].clone(),
        hessian=x.T @ x / len(x) if hessian is None else hessian,
        absmax=x.abs().amax(0),
        mean_abs=x.abs().mean(0),
    )


def weights(columns: int = COLUMNS, seed: int = 1) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=g) * 0.05 for rows in (24, 8)]


def task(fmt: Format, w: list[torch.Tensor] | None = None, stats: Stats | None = None, **options) -> Task:
    w = weights() if w is None else w
    shared = shared_amax(w, fmt)
    return Task(
        weights=w,
        fmt=fmt,
        dtype=torch.bfloat16,
        stats=stats_of(inputs()) if stats is None else stats,
        amax=shared,
        options=options,
    )


def layer_error(w: list[torch.Tensor], solved, hessian: torch.Tensor) -> float:
    """tr(D H D^T), D the difference of the weights: the mean squared output error."""
    d = torch.cat([dequantize(q) - x for q, x in zip(solved.qtensors, w, strict=True)]).double()
    return float((d @ hessian.double() * d).sum())


# ---- the paper, slowly -----------------------------------------------------------------------------------------


def nearest(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The nearest value of the code grid, by trying all of them (float64; ties do not occur in random data)."""
    if fmt.kind == "int":
        grid = torch.arange(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1), dtype=torch.float64)
    else:
        half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        grid = torch.cat((-half, half))
    return grid[(x[:, None] - grid).abs().argmin(1)]


def slow_gptq(w, hessian, scale, zero, fmt, damp, order) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323 column by column, with an explicit inverse that shrinks by equation 3.

    w, scale, zero: float64 [out, in], everything already spread over the elements. Returns the dequantized weight.
    """
    w, n = w.double().clone(), len(hessian)
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(n, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    result = torch.zeros_like(w)
    for j in order.tolist():
        code = nearest(w[:, j] / scale[:, j] + zero[:, j], fmt)
        result[:, j] = (code - zero[:, j]) * scale[:, j]
        error = (w[:, j] - result[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j][None]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("name", ["int4", "int8", "int3_asym", "int4_channel", "nvfp4"])
def test_gptq_is_the_papers_algorithm(name, order):
    fmt = SMALL[name]
    t = task(fmt, damp=0.02, order=order)
    solved = gptq(t)
    assert solved.fallback is None
    h = t.stats.hessian
    columns = (
        torch.argsort(h.diagonal(), descending=True, stable=True) if order == "activation" else torch.arange(COLUMNS)
    )
    for w, q in zip(t.weights, solved.qtensors, strict=True):
        scale = expand(effective_scale(q.params, fmt), fmt, q.shape).expand(q.shape).double()
        zero = torch.zeros_like(scale) if q.params.zero is None else expand(q.params.zero, fmt, q.shape).expand(q.shape)
        reference = slow_gptq(w, h, scale, zero.double(), fmt, 0.02, columns)
        same = (reference.float() - dequantize(q)).abs() < 1e-6
        assert float(same.float().mean()) > 0.999  # a tie that float32 sees the other way would spread along its row
        assert bool(same.all(1).float().mean() > 0.9)


def test_activation_order_helps_where_channels_differ():
    x = inputs() * torch.linspace(0.05, 3, COLUMNS)  # the strong channels come last
    stats, w = stats_of(x), weights()
    natural, ordered = (gptq(task(SMALL["int3"], w, stats, order=o)) for o in ("none", "activation"))
    assert layer_error(w, ordered, stats.hessian) < layer_error(w, natural, stats.hessian)


# ---- coordinate descent behind it ------------------------------------------------------------------------------


def damped(hessian: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    return hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("fmt", SMALL.values(), ids=SMALL)
def test_no_sweep_makes_the_error_larger(fmt, order):
    found = [gptq(task(fmt, sweeps=n, order=order)) for n in (0, 1, 2, 5)]
    h = damped(stats_of(inputs()).hessian)
    errors = [layer_error(weights(), solved, h) for solved in found]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors)) and errors[-1] < errors[0]


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("name", ["int2", "int4", "int3_asym", "int4_channel", "nvfp4"])
def test_sweeps_end_where_no_code_and_no_scale_alone_can_be_better(name, order):
    fmt = SMALL[name]
    t = task(fmt, sweeps=60, order=order, damp=0.02)
    h = damped(t.stats.hessian, 0.02)
    lowest, highest = (-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1) if fmt.kind == "int" else (-6, 6)
    for w, q in zip(t.weights, gptq(t).qtensors, strict=True):
        scale = expand(effective_scale(q.params, fmt), fmt, q.shape).expand(q.shape).double()
        zero = 0 if q.params.zero is None else expand(q.params.zero, fmt, q.shape).expand(q.shape).double()
        e = w.double() - dequantize(q).double()
        slope, curve = e @ h, h.diagonal()
        least = float((e @ h * e).sum()) / e.numel()
        if fmt.kind == "int":  # of a code by one, up and down, where there is one
            for step in (-1, 1):
                change = curve * scale.square() - 2 * step * scale * slope
                there = (lowest <= q.codes + step) & (q.codes + step <= highest)
                assert float(change[there].min()) > -1e-3 * least
        if fmt.scale != "model":
            continue
        v, stored = q.codes.double() - zero, q.params.scale
        for other in (stored.float() * (1 + 2**-7), stored.float() * (1 - 2**-7)):  # a neighbour in bf16
            moved = expand(other.to(torch.bfloat16).float(), fmt, q.shape).expand(q.shape).double()
            for group in torch.arange(COLUMNS).split(fmt.group or COLUMNS):
                d = torch.zeros_like(e)
                d[:, group] = v[:, group] * (moved - scale)[:, group]
                change = (d @ h * d).sum(1) - 2 * (slope * d).sum(1)
                assert float(change.min()) > -1e-3 * least * COLUMNS


def test_sweeps_do_not_look_at_channels_that_are_never_active():
    x = inputs()
    x[:, 10:20] = 0
    loud = [t.clone() for t in weights()]
    for t in loud:
        t[:, 10:20] *= 1.5
    fmt = FORMATS["int4_channel"]  # one scale a row
    for t in loud:
        t[:, 0] = 0.5
    quiet = [t.clone() for t in loud]
    for t in quiet:
        t[:, 10:20] = 0
    a, b = (gptq(task(fmt, v, stats_of(x), sweeps=3)) for v in (quiet, loud))
    live = [i for i in range(COLUMNS) if not 10 <= i < 20]
    for p, q in zip(a.qtensors, b.qtensors, strict=True):
        assert torch.equal(p.params.scale, q.params.scale) and torch.equal(p.codes[:, live], q.codes[:, live])


# ---- every solver, every format --------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", SMALL.values(), ids=SMALL)
def test_gptq_beats_rounding_on_correlated_inputs(fmt):
    t = task(fmt)
    found, plain = gptq(t), rtn(t)
    assert found.fallback is None
    assert layer_error(t.weights, found, t.stats.hessian) < layer_error(t.weights, plain, t.stats.hessian)


@pytest.mark.parametrize("fmt", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_every_solver_owes(solver, fmt):
    t = task(fmt)
    before = [w.clone() for w in t.weights]
    solve = SOLVERS[solver].solve
    found, again = solve(t), solve(t)
    assert [q.shape for q in found.qtensors] == [tuple(w.shape) for w in t.weights]
    for q, same, w, kept in zip(found.qtensors, again.qtensors, t.weights, before, strict=True):
        assert torch.equal(w, kept)
        assert q.format == fmt and q.codes.is_contiguous()
        assert torch.equal(q.codes.view(torch.uint8), same.codes.view(torch.uint8))
        assert torch.equal(q.params.scale.view(torch.uint8), same.params.scale.view(torch.uint8))
        assert bool(dequantize(q).isfinite().all()) and bool((effective_scale(q.params, fmt) > 0).all())
        expected = find_params(w, fmt, torch.bfloat16, amax=t.amax)
        assert q.params.scale.shape == expected.scale.shape and q.params.scale.dtype == expected.scale.dtype
        assert (q.params.zero is None) is (expected.zero is None)
        if fmt.scale == "e4m3":
            assert torch.equal(q.params.global_scale, nvfp4_global_scale(t.amax))
        if fmt.strategy == "tensor":
            assert torch.equal(q.params.scale, expected.scale)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sweeps", [0, 3])
def test_rows_do_not_depend_on_their_company(solver, sweeps):
    """Linears of a group are solved as one, or in slices of rows: the codes are the same."""
    t = task(SMALL["int4"], sweeps=sweeps)
    together = SOLVERS[solver].solve(t).qtensors
    apart = [SOLVERS[solver].solve(replace(t, weights=[w])).qtensors[0] for w in t.weights]
    for a, b in zip(together, apart, strict=True):
        assert float((a.codes == b.codes).float().mean()) > 0.999


def test_rtn_needs_no_data_and_can_take_the_plain_range():
    w = weights()
    for fmt in SMALL.values():
        t = replace(task(fmt), stats=None)
        assert len(rtn(t).qtensors) == 2
    t = replace(task(SMALL["int4"]), stats=None, options={"search": "none"})
    for q, x in zip(rtn(t).qtensors, w, strict=True):
        assert torch.equal(q.params.scale, find_params(x, t.fmt, t.dtype).scale)


# ---- hostile statistics ----------------------------------------------------------------------------------------


def bad_hessians() -> dict[str, tuple[torch.Tensor, bool]]:
    """name: (Hessian, whether rounding is the only way left)."""
    x = inputs()
    good = x.T @ x / len(x)
    nan, inf, negative, indefinite = (good.clone() for _ in range(4))
    nan[3, 7] = float("nan")
    inf[5, 5] = float("inf")
    negative[9, 9] = -1.0
    indefinite[0, 1] = indefinite[1, 0] = 1e6 * float(good.diagonal().max())
    v = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(2))
    return {
        "nan": (nan, True),
        "inf": (inf, True),
        "zero": (torch.zeros(COLUMNS, COLUMNS), True),
        "negative diagonal": (negative, True),
        "indefinite": (indefinite, True),
        "rank one": (torch.outer(v, v), False),
        "one live channel": (torch.diag(torch.eye(COLUMNS)[4]), False),
        "huge": (good / good.diagonal().max() * 1e38, False),
        "largest float": (torch.eye(COLUMNS) * torch.finfo(torch.float32).max, False),
        "tiny": (good * 1e-38, False),
        "all but singular": (good + 1e4 * torch.ones_like(good), False),
    }


BAD = bad_hessians()


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("name", ["int4", "int4_asym", "nvfp4", "fp8_channel"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_hessians_end_in_a_finite_result(bad, name, order):
    hessian, hopeless = BAD[bad]
    t = task(SMALL[name], stats=stats_of(inputs(), hessian), order=order)
    solved = gptq(t)
    for q in solved.qtensors:
        assert bool(dequantize(q).isfinite().all()) and bool((effective_scale(q.params, t.fmt) > 0).all())
    assert (solved.fallback is not None) is hopeless
    plain = rtn(replace(t, stats=None))
    if hopeless:
        for q, r in zip(solved.qtensors, plain.qtensors, strict=True):
            assert torch.equal(q.codes.view(torch.uint8), r.codes.view(torch.uint8))


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e36, 3e38])
def test_the_scale_of_the_activations_does_not_matter(factor):
    x = inputs()
    good = x.T @ x / len(x)
    good = good / good.diagonal().max()
    first, scaled = (gptq(task(SMALL["int4"], stats=stats_of(x, h))) for h in (good, good * factor))
    for a, b in zip(first.qtensors, scaled.qtensors, strict=True):
        assert float((a.codes == b.codes).float().mean()) > 0.999


def test_dead_channels_are_rounded_and_send_no_error_on():
    x = inputs()
    x[:, 10:20] = 0
    w = weights()
    loud = [t.clone() for t in w]
    for t in loud:
        t[:, 10:20] *= 2.0  # a change in channels that are never active must not reach the others
    fmt = FORMATS["int4_channel"]  # one scale a row, fixed beforehand by the widest element
    for t in (*w, *loud):
        t[:, 0] = 0.5
    a, b = (gptq(task(fmt, v, stats_of(x))) for v in (w, loud))
    assert a.fallback is None and b.fallback is None
    live = [i for i in range(COLUMNS) if not 10 <= i < 20]
    for p, q in zip(a.qtensors, b.qtensors, strict=True):
        assert torch.equal(p.params.scale, q.params.scale)
        assert torch.equal(p.codes[:, live], q.codes[:, live])
        assert not torch.equal(p.codes[:, 10:20], q.codes[:, 10:20])


@pytest.mark.parametrize("name", ["int4_channel", "int8_asym_channel", "fp8", "int3_tensor"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_column(solver, name):
    x = inputs(columns=1)
    w = weights(columns=1)
    solved = SOLVERS[solver].solve(task(FORMATS[name], w, stats_of(x)))
    assert solved.fallback is None
    for q, v in zip(solved.qtensors, w, strict=True):
        assert bool(((dequantize(q) - v).abs() <= v.abs().max()).all())


@pytest.mark.parametrize("columns", [33, 100, 160])
def test_widths_that_panels_do_not_divide(columns):
    """Column loops work in panels: any width and group must give the slow reference's result."""
    x, w = inputs(columns), weights(columns)
    fmt = FORMATS["int4"].with_group(20 if columns % 20 == 0 else 11)
    t = task(fmt, w, stats_of(x))
    solved = gptq(t)
    for v, q in zip(w, solved.qtensors, strict=True):
        scale = expand(effective_scale(q.params, fmt), fmt, q.shape).double()
        reference = slow_gptq(v, t.stats.hessian, scale, torch.zeros_like(scale), fmt, 0.01, torch.arange(columns))
        assert float(((reference.float() - dequantize(q)).abs() < 1e-6).float().mean()) > 0.999
