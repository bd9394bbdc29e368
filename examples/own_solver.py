"""Add a solver of your own: one module with a function ``solve``, and one line in the table of solvers.

In qkit itself the module is a file beside qkit/solvers/rtn.py. From outside, the line is added before the run.
"""

import sys
from dataclasses import replace
from pathlib import Path

import qkit
from qkit.solvers.table import SOLVERS, Solver
from qkit.solvers.task import Solved, Task
from qkit.system.option import Option
from qkit.tensor.qtensor import dequantize, find_params, quantize


def solve(task: Task) -> Solved:
    """Round to nearest, then refit every scale to its codes by least squares, and round again, as often as ``rounds`` says.

    task.weights: float32 [out, in] each. A refit that makes the error of a weight larger is not used.
    """
    quantized = []
    for weight in task.weights:
        params = find_params(weight, task.fmt, task.dtype, amax=task.amax)
        best = quantize(weight, params, task.fmt)
        for _ in range(int(task.options["rounds"])):
            groups = (params.scale.shape[1], -1)
            grid, target = dequantize(best).unflatten(1, groups), weight.unflatten(1, groups)
            factor = (target * grid).sum(-1) / grid.square().sum(-1).clamp_min(1e-12)
            params = replace(params, scale=(params.scale.float() * factor).to(params.scale.dtype))
            trial = quantize(weight, params, task.fmt)
            if (dequantize(trial) - weight).square().sum() < (dequantize(best) - weight).square().sum():
                best = trial
        quantized.append(best)
    return Solved(quantized)


LEAST_SQUARES = Solver(
    summary="rounding to nearest with scales refit by least squares",
    options={"rounds": Option(default=2, summary="Number of refits", least=0, most=20)},
    module=lambda: sys.modules[__name__],
)


def main(folder: Path) -> None:
    SOLVERS["least-squares"] = LEAST_SQUARES
    out = folder / "tiny-llama-least-squares"
    report = qkit.quantize("tiny-llama", scheme="w4a16", method="least-squares", options={"rounds": 4}, out=out)
    print(f"{report.linears} quantized layers, {report.bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
