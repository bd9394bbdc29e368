"""The table of solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qkit.capture import Stats
from qkit.solvers import Solved, Task
from qkit.solvers.gptq import compensated, gptq, prepare
from qkit.solvers.rtn import rtn


@dataclass(frozen=True)
class Solver:
    """needs_hessian: calibration rows must be run and the Hessian of every group gathered.
    options: {name: (default, what it does)}
    aim: the weights that are solved for, instead of those that are there"""

    solve: Callable[[Task], Solved]
    needs_hessian: bool
    summary: str
    options: dict[str, tuple[object, str]]
    prepare: Callable[[Stats, dict[str, Any]], Any] | None = None
    aim: Callable[[list[Tensor], Stats, dict[str, Any]], list[Tensor]] | None = None


SIGNED = (False, "scales of symmetric integers of up to 4 bits may be negative: the larger side gets the extra code")

SOLVERS: dict[str, Solver] = {
    "rtn": Solver(
        rtn,
        False,
        "round to nearest, with a scale search by squared error; needs no data",
        {
            "search": ("mse", "'mse' searches the scale of each group, 'none' takes its full range"),
            "signed": SIGNED,
        },
    ),
    "gptq": Solver(
        gptq,
        True,
        "column by column, later columns absorb the error (arXiv 2210.17323)",
        {
            "damp": (0.01, "damping of the Hessian, as a fraction of its mean diagonal"),
            "order": ("none", "'activation' takes columns by falling activation energy"),
            "signed": SIGNED,
            "sweeps": (
                0,
                "passes of coordinate descent behind it: scales, then every code once more (arXiv 2309.01885)",
            ),
            "compensate": (
                0.0,
                "share, 0 to 1, of the change of its inputs that a layer makes up for (arXiv 2504.02692)",
            ),
        },
        prepare,
        compensated,
    ),
}
