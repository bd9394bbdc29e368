"""Round to nearest: every weight to the nearest code of its group's grid.

  q = round(w / s),  w~ = q s        s from the range of the group, or from a search over fractions of it that
                                     minimizes  sum_j c_j (w_j - w~_j)^2

with c_j = mean x_j^2 where calibration rows were run, else 1. It needs no data: without rows, a checkpoint is quantized at
reading speed.
"""

from __future__ import annotations

from qkit.solvers.task import Solved, Task
from qkit.tensor.qtensor import find_params, quantize


def solve(task: Task) -> Solved:
    """The weights of a task, rounded to nearest. Options: ``search`` ('mse' or 'none'), ``signed``."""
    importance = None if task.stats is None else task.stats.mean_square
    search = task.options.get("search", "mse") == "mse"
    return Solved(
        [
            quantize(
                w,
                find_params(
                    w,
                    task.fmt,
                    task.dtype,
                    importance=importance,
                    search=search,
                    amax=task.amax,
                    signed=bool(task.options.get("signed", False)),
                ),
                task.fmt,
            )
            for w in task.weights
        ]
    )
