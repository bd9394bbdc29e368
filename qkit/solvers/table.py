"""The table of solvers: what each name of ``catalog.SOLVERS`` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qkit import catalog
from qkit.capture import Stats
from qkit.solvers import Solved, Task
from qkit.solvers.gptq import compensated, gptq, prepare
from qkit.solvers.rtn import rtn


@dataclass(frozen=True)
class Solver(catalog.SolverInfo):
    """aim: the weights that are solved for, instead of those that are there"""

    solve: Callable[[Task], Solved]
    prepare: Callable[[Stats, dict[str, Any]], Any] | None = None
    aim: Callable[[list[Tensor], Stats, dict[str, Any]], list[Tensor]] | None = None


SOLVERS: dict[str, Solver] = {
    "rtn": Solver(**vars(catalog.SOLVERS["rtn"]), solve=rtn),
    "gptq": Solver(**vars(catalog.SOLVERS["gptq"]), solve=gptq, prepare=prepare, aim=compensated),
}
