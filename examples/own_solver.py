"""Add a solver of your own: one module with a function ``solve``, and one line in the table of solvers.

In qkit itself the module is a file beside qkit/solvers/rtn.py. From outside, the line is added before the run.
"""

import sys
from pathlib import Path

import torch

import qkit
from qkit.solvers.table import SOLVERS, Solver
from qkit.solvers.task import Solved, Task
from qkit.system.option import Option
from qkit.tensor.qtensor import find_params, quantize


def solve(task: Task) -> Solved:
    """Round at random, up or down, in proportion to the distance; task.weights: float32 [out, in] each."""
    generator = torch.Generator().manual_seed(int(task.options["noise_seed"]))
    quantized = []
    for weight in task.weights:
        params = find_params(weight, task.fmt, task.dtype, amax=task.amax)
        step = params.scale.float().repeat_interleave(weight.shape[1] // params.scale.shape[1], dim=1)
        noise = (torch.rand(weight.shape, generator=generator) - 0.5) * step * float(task.options["noise"])
        quantized.append(quantize(weight + noise, params, task.fmt))
    return Solved(quantized)


STOCHASTIC = Solver(
    summary="stochastic rounding",
    options={
        "noise": Option(default=0.5, summary="Width of the noise, in steps of the grid", least=0, most=1),
        "noise_seed": Option(default=0, summary="Seed of the noise", least=0),
    },
    module=lambda: sys.modules[__name__],
)


def main(folder: Path) -> None:
    SOLVERS["stochastic"] = STOCHASTIC
    out = folder / "tiny-llama-stochastic"
    report = qkit.quantize("tiny-llama", scheme="w4a16", method="stochastic", options={"noise": 0.25}, out=out)
    print(f"{report.linears} quantized layers, {report.bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
