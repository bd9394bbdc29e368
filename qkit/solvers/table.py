"""The table of solvers. It imports no torch, so that a command can be checked before that is loaded.

A solver is a module with a function ``solve(task) -> Solved``. It may have ``prepare(stats, options)``, which is computed once
for a group whose rows are then solved in slices, and ``aim(weights, stats, options)``, which gives target weights in place of
the original ones. To add a solver, write the module (``rtn.py`` is the shortest), and add a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qkit.system.option import E2E_STEPS, SIGNED, Option, Options, needs_of_options

if TYPE_CHECKING:
    from torch import Tensor

    from qkit.calibration.statistics import Stats
    from qkit.solvers.task import Solved, Task


@dataclass(frozen=True, kw_only=True)
class Solver:
    """An entry of the table.

    needs:        what the solver needs from calibration, see ``transforms.table.NEEDS``
    option_needs: (option, need) pairs: what it needs where an option does not have its default
    module:       a function that imports the solver's module
    """

    summary: str
    options: Options
    module: Callable[[], Any]
    needs: frozenset[str] = frozenset()
    option_needs: tuple[tuple[str, str], ...] = ()

    @property
    def needs_hessian(self) -> bool:
        """Whether calibration rows must be run and the Hessian of every group gathered."""
        return "hessian" in self.needs

    def needs_with(self, options: dict[str, Any]) -> frozenset[str]:
        """The needs of the solver with these options."""
        return self.needs | needs_of_options(self.option_needs, self.options, options)

    @property
    def solve(self) -> Callable[[Task], Solved]:
        """The function that solves a task."""
        return self.module().solve  # type: ignore[no-any-return]

    @property
    def prepare(self) -> Callable[[Stats, dict[str, Any]], Any] | None:
        """The function that prepares a group once, or None."""
        return getattr(self.module(), "prepare", None)

    @property
    def aim(self) -> Callable[[list[Tensor], Stats, dict[str, Any]], list[Tensor]] | None:
        """The function that gives target weights, or None."""
        return getattr(self.module(), "aim", None)


SOLVERS: dict[str, Solver] = {
    "rtn": Solver(
        summary="round to nearest with a scale search by squared error, without calibration data",
        options={
            "search": Option(
                default="mse",
                summary="scale of each group: 'mse' for the least squared error, 'none' for the full range",
                choices=("mse", "none"),
            ),
            "signed": SIGNED,
        },
        module=lambda: import_module("qkit.solvers.rtn"),
    ),
    "gptq": Solver(
        summary="rounding column by column, with the error compensated in later columns (arXiv 2210.17323)",
        options={
            "damp": Option(default=0.01, summary="damping of the Hessian, as a fraction of its mean diagonal"),
            "order": Option(
                default="none",
                summary="order of columns: 'activation' starts with the largest activation energy",
                choices=("none", "activation"),
            ),
            "signed": SIGNED,
            "sweeps": Option(
                default=0,
                gguf=2,
                summary="passes of coordinate descent afterwards, over scales and codes (arXiv 2309.01885)",
                least=0,
            ),
            "compensate": Option(
                default=0.0,
                gguf=0.5,
                summary="share of the input error, 0 to 1, that a layer compensates (arXiv 2504.02692)",
                least=0,
                most=1,
            ),
            "guided": Option(
                default=False,
                summary="tokens weighted by their effect on the loss, by gradients of the original model (arXiv 2505.07004)",
            ),
            "e2e_steps": E2E_STEPS,
        },
        needs=frozenset({"hessian"}),
        option_needs=(("compensate", "original_inputs"), ("guided", "loss_gradients")),
        module=lambda: import_module("qkit.solvers.gptq"),
    ),
}
