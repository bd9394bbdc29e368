"""How long a run takes on this machine: an estimate from small pieces of its work that are timed, and from the forecast.

Each phase of the forecast has its operations. Here a piece of the same work, of the shape that most of the weights have, runs
on every worker, and its operations in a second stand for the whole phase. What no phase counts (attention, activations,
reading and writing) is in ``BESIDE``, a factor that was measured.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from qkit.calibration.statistics import Stats
from qkit.engine.forecast import Forecast
from qkit.engine.solving import slice_rows
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan
from qkit.solvers.table import SOLVERS
from qkit.solvers.task import Task
from qkit.system.parallel import Workers, workers
from qkit.tensor.qtensor import dequantize, weight_sha256

BESIDE = 1.0
START = 3.0  # seconds that a command takes to load its libraries
_TOKENS = 512  # of a piece
_VALUES = 1 << 20  # weights of a piece


def estimated_seconds(plan: Plan, forecast: Forecast, threads: int) -> float:
    """Seconds of the run of a plan. Its pieces take about a second."""
    if not plan.linears:
        return START
    with workers(threads) as pool:
        rates = _Pieces(plan, pool).rates()
    return START + BESIDE * sum(ops / rates[phase] for phase, ops in forecast.operations.items() if ops)


class _Pieces:
    """Pieces of the phases of a run. Weights and inputs are random: solvers take the same time for all numbers."""

    def __init__(self, plan: Plan, pool: Workers) -> None:
        self.plan, self.pool = plan, pool
        self.linear = _largest_share(plan)
        random = torch.Generator().manual_seed(0)
        rows, columns = self.linear.shape
        self.dtype = getattr(torch, plan.run_dtype)
        self.weight = torch.randn(rows, columns, generator=random)
        self.inputs = torch.randn(_TOKENS, columns, generator=random)

    def rates(self) -> dict[str, float]:
        """Operations in a second of each phase, all workers together."""
        (rows, columns), options = self.linear.shape, self.linear.options
        low, x = self.weight.to(self.dtype), self.inputs.to(self.dtype)
        solver = SOLVERS[self.linear.solver]
        stats, prepared = None, None
        rates = {"forward passes": self._rate(2.0 * _TOKENS * rows * columns, lambda: nn.functional.linear(x, low))}
        rates["learned rounding"] = rates["Hessians"] = rates["factorizations"] = rates["forward passes"]
        if solver.needs_hessian:
            hessian = self.inputs.T @ self.inputs / _TOKENS
            rates["Hessians"] = self._rate(float(columns**2 * _TOKENS), lambda: self.inputs.T @ self.inputs)
            stats = Stats(tokens=_TOKENS, mean_square=hessian.diagonal().clone(), sample=x, hessian=hessian)
            prepare = solver.prepare
            if prepare is not None:
                rates["factorizations"] = self._rate(columns**3 / 3, lambda: prepare(stats, options))
                prepared = prepare(stats, options)
        fmt, dtype = self.linear.weights, getattr(torch, self.plan.dtype)
        task = Task(weights=[self.weight], fmt=fmt, dtype=dtype, stats=stats, options=options, prepared=prepared)
        swept = (1.0 + 4 * options.get("sweeps", 0)) * columns if solver.needs_hessian else 0.0
        rates["solving"] = self._rate(rows * columns * (swept + 88.0), lambda: solver.solve(task))
        q = solver.solve(task).qtensors[0]
        rates["packing and checking"] = self._rate(20.0 * rows * columns, lambda: weight_sha256([q]) and dequantize(q))
        return rates

    def _rate(self, operations: float, work: Callable[[], object]) -> float:
        """Operations in a second, when every worker does the work. The first run is not timed."""
        work()
        began = time.perf_counter()
        self.pool.map(lambda _: work(), range(2 * self.pool.count))
        return 2 * self.pool.count * operations / (time.perf_counter() - began)


def _largest_share(plan: Plan) -> LinearPlan:
    """A linear of the shape that most weights have, with fewer rows where it is large."""
    sizes = Counter[tuple[int, int]]()
    for p in plan.linears.values():
        sizes[p.shape[0], p.shape[1]] += p.shape[0] * p.shape[1]
    rows, columns = sizes.most_common(1)[0][0]
    found = next(p for p in plan.linears.values() if tuple(p.shape) == (rows, columns))
    return replace(found, shape=(max(64, min(rows, _VALUES // columns, slice_rows(rows, columns))), columns))
