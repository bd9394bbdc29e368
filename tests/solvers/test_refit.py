"""Scales and minima of GGUF's types after a refit: nothing errs more, and what is stored is what errors were computed with."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qkit.calibration.statistics import Stats
from qkit.solvers.gptq import prepare, solve
from qkit.solvers.refit import Refit
from qkit.solvers.task import Task
from qkit.tensor.block_params import largest_integers
from qkit.tensor.formats import GGUF_FORMATS
from qkit.tensor.grid import codes_to_grid
from qkit.tensor.params import Params
from qkit.tensor.qtensor import dequantize

COLUMNS, ROWS = 512, (5, 3)
# The scales of MXFP4 and NVFP4 are powers of two and FP8: a refit leaves them.
REFITTED = {name: fmt for name, fmt in GGUF_FORMATS.items() if fmt.scale not in ("e8m0", "e4m3")}


def made(fmt, **options) -> tuple[Task, torch.Tensor]:
    """A task of two weights with correlated inputs, and its damped Hessian in float64."""
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(COLUMNS, COLUMNS, generator=g) / COLUMNS**0.5 + 0.3 * torch.randn(COLUMNS, 1, generator=g)
    x = torch.randn(700, COLUMNS, generator=g) @ mix.T * torch.exp(0.7 * torch.randn(COLUMNS, generator=g))
    weights = [torch.randn(rows, COLUMNS, generator=g) * 0.05 for rows in ROWS]
    h = x.T @ x / len(x)
    stats = Stats(
        tokens=len(x), mean_square=h.diagonal().clone(), sample=x[::7].clone(), hessian=h, absmax=None, mean_abs=None
    )
    damping = 0.01 * h.diagonal().double().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    return Task(weights=weights, fmt=fmt, dtype=torch.float32, stats=stats, options=options), h.double() + damping


def error(t: Task, qtensors, h: torch.Tensor) -> float:
    d = torch.cat([dequantize(q) - w for q, w in zip(qtensors, t.weights, strict=True)]).double()
    return float((d @ h * d).sum())


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("fmt", GGUF_FORMATS.values(), ids=GGUF_FORMATS)
def test_no_sweep_over_a_type_of_gguf_makes_the_error_larger(fmt, order):
    errors = []
    for sweeps in (0, 1, 3):
        t, h = made(fmt, sweeps=sweeps, order=order)
        errors.append(error(t, solve(t).qtensors, h))
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors)) and errors[-1] < errors[0]


def refitted(fmt, runs: int):
    """(weights, result of gptq, of so many refits after it, the Hessian, errors as the last refit leaves them)."""
    t, h = made(fmt, sweeps=1)
    factor, solved = prepare(t.stats, t.options), solve(replace(t, options={}, prepared=None))
    w, first = torch.cat(t.weights), solved.qtensors
    codes = torch.cat([q.codes for q in first])
    p = Params.cat([q.params for q in first], dim=0)
    before = replace(first[0], codes=codes, params=p)
    errors = (w - dequantize(before)).T.contiguous()
    for _ in range(runs):
        p = Refit(p, fmt, codes_to_grid(codes, fmt).T, errors, factor.diagonal, factor.pull).run()
    return w, before, replace(before, params=p), h, errors


@pytest.mark.parametrize("fmt", REFITTED.values(), ids=REFITTED)
def test_a_refit_stores_what_it_computed_with_and_errs_less_under_the_same_codes(fmt):
    w, before, after, h, errors = refitted(fmt, 1)
    assert torch.allclose((w - dequantize(after)).T, errors, atol=2e-6)
    old, new = ((q @ h * q).sum() for q in ((dequantize(x) - w).double() for x in (before, after)))
    assert float(new) < float(old)
    for name in ("scale", "minimum", "super_scale", "super_minimum"):
        a, b = getattr(before.params, name), getattr(after.params, name)
        assert (a is None) == (b is None) and (a is None or a.dtype == b.dtype)
    if fmt.scale == "super":
        low, high = largest_integers(fmt)
        assert int(after.params.scale.min()) >= low and int(after.params.scale.max()) <= high


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_refits_end_where_no_integer_of_a_group_can_be_better(name):
    fmt = GGUF_FORMATS[name]
    w, _, after, h, _ = refitted(fmt, 25)
    e = (w - dequantize(after)).double()
    least, (low, high) = (e @ h * e).sum(1), largest_integers(fmt)
    checked = 0
    for place in range(after.params.scale.shape[1]):
        for step in (-1, 1):
            scale = after.params.scale.clone()
            scale[:, place] += step
            there = (scale[:, place] >= low) & (scale[:, place] <= high) & (scale[:, place] != 0)
            d = (w - dequantize(replace(after, params=replace(after.params, scale=scale)))).double()
            assert bool(((d @ h * d).sum(1) >= least * (1 - 1e-4))[there].all())
            checked += int(there.sum())
    assert checked > sum(ROWS)


def test_params_that_are_split_are_those_that_were_joined():
    t, _ = made(GGUF_FORMATS["q4_k"])
    parts = [q.params for q in solve(t).qtensors]
    for a, b in zip(parts, Params.cat(parts, dim=0).split([len(w) for w in t.weights]), strict=True):
        for name in ("scale", "minimum", "super_scale", "super_minimum"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert b.zero is None and b.global_scale is None
