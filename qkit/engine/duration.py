"""An estimate of how long a run takes on this machine: a piece of every phase is timed, and the forecast says how much there
is of it.

The solver is timed on a few rows of the shape that costs most, with its options, on random weights. Products are timed in the
dtype of the run. What a piece leaves out (attention, files, what threads wait for) is in ``FACTORS``, which were measured on
whole runs of tiny-llama and SmolLM2-135M; reports/duration has them beside the estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import linear

from qkit.calibration.statistics import Stats
from qkit.engine.end_to_end import END_TO_END
from qkit.engine.forecast import UPDATE, Forecast, solving_operations
from qkit.engine.solving import solve_matrix
from qkit.engine.synthetic_rows import SYNTHETIC
from qkit.families.blocks import Linear
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan
from qkit.rounding.learned_weight import LearnedWeight, LearningState
from qkit.solvers.table import SOLVERS
from qkit.system.parallel import Workers, workers
from qkit.system.timing import fastest_run
from qkit.tensor.formats import fit_group
from qkit.tensor.input_transform import PLAIN
from qkit.tensor.qtensor import find_params, quantize, shared_amax

PACKING = "packing and checking"
# Seconds of a phase over those of its timed piece.
FACTORS = {
    "forward passes": 2.0,
    "Hessians": 1.8,
    "factorizations": 2.0,
    "scales of inputs": 1.6,
    "solving": 1.8,
    "learned rounding": 2.0,
    "updates of learned rounding": 1.5,
    "errors weighted by the loss": 2.0,
    "tokens weighted by the loss": 2.0,
    SYNTHETIC: 4.0,
    END_TO_END: 2.0,
    PACKING: 5.0,
}
# Seconds of passes of a profile over those of products in float32; from one profile of tiny-llama.
PROFILE_PASSES = 2.0
REST = "everything else"
START = 10.0  # seconds: libraries, the plan, the calibration samples, the first and the last file
_ROWS, _TOKENS = 256, 512  # of a timed piece
_WIDEST = 4096  # columns of a timed piece at the most
_PASSES = 20.0  # operations of packing and checking a weight, as the forecast counts them
_TIMES = 5


def seconds_by_phase(plan: Plan, forecast: Forecast, threads: int) -> dict[str, float]:
    """The estimated seconds of a whole run, its export and proof included: the sum of all values. Takes a second or two
    itself."""
    with workers(1) as pool:
        rates = dict(_rates(plan, pool))
    counted = {phase: n for phase, n in forecast.operations.items() if n}
    return {**{phase: FACTORS[phase] * n / rates[phase] / threads for phase, n in counted.items()}, REST: START}


def profile_seconds(probes: Sequence[tuple[Plan, Forecast]], passes: float, threads: int) -> float:
    """The estimated seconds of a profile. probes: its solver runs, of which the longest one is timed in pieces; passes:
    operations of its passes through the model in float32"""
    work = [sum(forecast.operations.values()) for _, forecast in probes]
    plan, forecast = probes[work.index(max(work))]
    phases = seconds_by_phase(plan, forecast, threads)
    one_run = sum(seconds for phase, seconds in phases.items() if phase not in (PACKING, REST))
    weights, inputs = torch.randn(_WIDEST // 4, _WIDEST // 4), torch.randn(_TOKENS, _WIDEST // 4)
    rate = _rate(2.0 * inputs.shape[0] * weights.numel(), _product(weights, inputs, torch.float32))
    return START + one_run * sum(work) / max(work) + PROFILE_PASSES * passes / rate / threads


def _rates(plan: Plan, pool: Workers) -> Iterator[tuple[str, float]]:
    """Operations a second of one thread, by phase."""
    costly = max(plan.linears.values(), key=lambda p: p.shape[0] * p.shape[1] ** 2)
    columns, rows = min(costly.shape[1], _WIDEST), min(costly.shape[0], _ROWS)
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, columns, generator=draw) / columns**0.5
    inputs = torch.randn(_TOKENS, columns, generator=draw)
    product = 2.0 * _TOKENS * rows * columns
    forward = _rate(product, _product(weights, inputs, getattr(torch, plan.run_dtype)))
    exact = _rate(product, _product(weights, inputs, torch.float32))
    yield from ((phase, forward) for phase in ("forward passes", "tokens weighted by the loss", SYNTHETIC, END_TO_END))
    yield from ((phase, exact) for phase in ("errors weighted by the loss", "scales of inputs"))
    yield "learned rounding", forward
    updates = _rate(float(UPDATE * rows * columns), _update(costly, weights)) if plan.learns else exact
    yield "updates of learned rounding", updates
    yield "Hessians", _rate(2.0 * _TOKENS * columns**2, lambda: inputs.T @ inputs)
    hessian = inputs.T @ inputs / _TOKENS + torch.eye(columns)
    yield "factorizations", _rate(columns**3 / 3, lambda: torch.linalg.cholesky_ex(hessian))
    yield PACKING, _rate(_PASSES * rows * columns, lambda: _packed(weights))
    yield "solving", _solving_rate(costly, weights, inputs, hessian, pool)


def _product(weights: torch.Tensor, inputs: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    w, x = weights.to(dtype), inputs.to(dtype)
    return lambda: linear(x, w)


def _update(p: LinearPlan, weights: torch.Tensor) -> Callable[[], object]:
    """A step of learned rounding."""
    fmt = fit_group(p.weights, weights.shape[1])
    q = quantize(weights, find_params(weights, fmt, torch.bfloat16, amax=shared_amax([weights, weights], fmt)), fmt)
    place = Linear(name=p.name, param=f"{p.name}.weight", shape=(weights.shape[0], weights.shape[1]))
    state = LearningState.begin(LearnedWeight.of(place, weights, q, PLAIN), torch.bfloat16)
    return lambda: state.step([weights], 0.0)


def _packed(weights: torch.Tensor) -> object:
    """About as many passes over the weights as packing, export and proof take."""
    out = weights
    for _ in range(int(_PASSES)):
        out = (out * 1.01).round()
    return out


def _solving_rate(
    p: LinearPlan, weights: torch.Tensor, inputs: torch.Tensor, hessian: torch.Tensor, pool: Workers
) -> float:
    """Of the solver on these rows, without what is prepared once for all rows."""
    stats = None
    if SOLVERS[p.solver].needs_hessian:
        square = inputs.square().mean(0)
        stats = Stats(tokens=len(inputs), mean_square=square, sample=inputs, hessian=hessian)
    rows, columns = weights.shape
    fmt = fit_group(p.weights, columns)
    part = replace(p, shape=(rows, columns), weights=fmt, activations=None, outliers=0, rank=0, residual=0)
    prepare = SOLVERS[p.solver].prepare
    whole = fastest_run(lambda: solve_matrix(part, weights, stats, torch.bfloat16, pool), _TIMES)
    first = 0.0 if prepare is None or stats is None else fastest_run(lambda: prepare(stats, p.options), _TIMES)
    return solving_operations(part, rows, columns) / max(whole - first, whole / 10)


def _rate(operations: float, work: Callable[[], object]) -> float:
    return operations / fastest_run(work, _TIMES)
