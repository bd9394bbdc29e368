"""The table of transforms, in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from qkit.formats import Scheme
from qkit.solvers.table import SIGNED
from qkit.transforms import BlockState
from qkit.transforms.balance import balanced_error
from qkit.transforms.residual import SHARE, find_residual
from qkit.transforms.rotate import rotate_block
from qkit.transforms.scales import awq_candidates, smooth_block, smoothquant_candidates


@dataclass(frozen=True)
class Transform:
    """stage: 'load' (before rows run), 'stats' (after), 'inputs' (with each linear, as it is solved) or 'block' (when all of
    its linears are solved).

    apply(state, schemes by linear name, seed)"""

    stage: str
    apply: Callable[[BlockState, dict[str, Scheme], int], None]
    summary: str
    options: dict[str, tuple[object, str]]


_OPTIONS: dict[str, tuple[object, str]] = {
    "inputs": ("quantized", "of the search: behind quantized blocks, original, or distort: both, as the paper says"),
    "ratios": ("part", "what errors at pictures weigh: one ratio for each part of a block, or for each linear"),
}


TRANSFORMS: dict[str, Transform] = {
    "rotate": Transform(
        "load",
        lambda state, schemes, seed: rotate_block(state, seed),
        "Hadamard rotation of the residual stream and the value heads, folded into the weights (arXiv 2404.00456)",
        {},
    ),
    "hadamard": Transform(
        "inputs",
        lambda state, schemes, seed: None,  # of every linear by itself, when it is solved (``inputs``)
        "block Hadamard transform of every layer's inputs at run time, of diffusion transformers (arXiv 2603.18742)",
        {},
    ),
    "smoothquant": Transform(
        "stats",
        lambda state, schemes, seed: smooth_block(state, schemes, smoothquant_candidates),
        "moves outliers from activations to weights, strength searched per group (arXiv 2211.10438)",
        {},
    ),
    "awq": Transform(
        "stats",
        lambda state, schemes, seed: smooth_block(state, schemes, awq_candidates),
        "scales salient channels up before rounding, exponent searched per group (arXiv 2306.00978)",
        {},
    ),
    "mbq": Transform(
        "stats",
        lambda state, schemes, seed: smooth_block(state, schemes, awq_candidates, balanced_error),
        "awq for vision-language models: errors at pictures weighed against errors at answers (arXiv 2412.19509)",
        _OPTIONS,
    ),
    "mbq-mse": Transform(
        "stats",
        lambda state, schemes, seed: smooth_block(state, schemes, awq_candidates, partial(balanced_error, power=2)),
        "mbq with squared errors",
        _OPTIONS,
    ),
    "residual": Transform(
        "stats",
        lambda state, schemes, seed: find_residual(state, schemes),
        "input channels that FP4 serves badly are quantized twice; NVFP4 scales to the better of two (arXiv 2601.07475)",
        {"share": (SHARE, "of the input channels that are quantized twice, 0 to 1: products grow by as much")},
    ),
    "signround": Transform(
        "block",
        lambda state, schemes, seed: None,  # of solved linears, in the loop (``reconstruct``)
        "codes and ranges of a whole block learned together, from those of the solver on (arXiv 2309.05516)",
        {
            "steps": (128, "of learned rounding, for every block"),
            "batch": (4, "rows of one step"),
            "rate": (0.0, "of the first step, in units of the grid; 0: 1.5 / steps, at most 0.02"),
            "weigh": (
                False,
                "weigh errors of a block by what the loss makes of them; loads the whole model in float32",
            ),
            "whole": (
                0,
                "steps for all blocks together after that, on what the model expects; loads it whole in float32",
            ),
            "signed": (True, SIGNED[1]),  # of the solver before it, whose default is otherwise no
        },
    ),
}
# By name: options of learned rounding. Time grows with the steps.
EFFORTS: dict[str, dict[str, Any]] = {"fast": {"steps": 32}, "default": {"steps": 128}, "best": {"steps": 512}}
BALANCED = ("mbq", "mbq-mse")  # those that need pictures and answers
