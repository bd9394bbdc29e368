"""Names that users write, with what they mean: solvers, transforms, efforts, measures.

Data alone, so that a command can be checked before torch is imported. What a solver or a transform does stands beside its
name in ``solvers.table`` and ``transforms.table``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qkit.errors import UsageError

Options = dict[str, tuple[object, str]]  # {name: (default, what it does)}


@dataclass(frozen=True)
class SolverInfo:
    """needs_hessian: calibration rows must be run and the Hessian of every group gathered."""

    needs_hessian: bool
    summary: str
    options: Options


@dataclass(frozen=True)
class TransformInfo:
    """stage: 'load' (before rows run), 'stats' (after), 'inputs' (with each linear, as it is solved) or 'block' (when all of
    its linears are solved)."""

    stage: str
    summary: str
    options: Options


SIGNED = (False, "scales of symmetric integers of up to 4 bits may be negative: the larger side gets the extra code")
SHARE = 0.25  # of the input channels that residual quantization doubles
RATIOS = ("part", "linear")
INPUTS = ("quantized", "original", "distort")

SOLVERS: dict[str, SolverInfo] = {
    "rtn": SolverInfo(
        False,
        "round to nearest, with a scale search by squared error; needs no data",
        {
            "search": ("mse", "'mse' searches the scale of each group, 'none' takes its full range"),
            "signed": SIGNED,
        },
    ),
    "gptq": SolverInfo(
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
    ),
}

_BALANCE: Options = {
    "inputs": (INPUTS[0], "of the search: behind quantized blocks, original, or distort: both, as the paper says"),
    "ratios": (RATIOS[0], "what errors at pictures weigh: one ratio for each part of a block, or for each linear"),
}

TRANSFORMS: dict[str, TransformInfo] = {
    "rotate": TransformInfo(
        "load",
        "Hadamard rotation of the residual stream and the value heads, folded into the weights (arXiv 2404.00456)",
        {},
    ),
    "hadamard": TransformInfo(
        "inputs",
        "block Hadamard transform of every layer's inputs at run time, of diffusion transformers (arXiv 2603.18742)",
        {},
    ),
    "smoothquant": TransformInfo(
        "stats",
        "moves outliers from activations to weights, strength searched per group (arXiv 2211.10438)",
        {},
    ),
    "awq": TransformInfo(
        "stats",
        "scales salient channels up before rounding, exponent searched per group (arXiv 2306.00978)",
        {},
    ),
    "mbq": TransformInfo(
        "stats",
        "awq for vision-language models: errors at pictures weighed against errors at answers (arXiv 2412.19509)",
        _BALANCE,
    ),
    "mbq-mse": TransformInfo("stats", "mbq with squared errors", _BALANCE),
    "residual": TransformInfo(
        "stats",
        "input channels that FP4 serves badly are quantized twice; NVFP4 scales to the better of two (arXiv 2601.07475)",
        {"share": (SHARE, "of the input channels that are quantized twice, 0 to 1: products grow by as much")},
    ),
    "signround": TransformInfo(
        "block",
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

PROFILE = "profile.json"  # in the folder of a profile
REQUANT = "requant"  # a method that searches before anything is planned
REQUANT_OUTLIERS, REQUANT_SIGNIFICANT = 0.45, 0.05  # percent, of the paper's SqueezeLLM runs

MEASURES = ("weight", "output", "output_norm", "first", "first_x", "fisher", "pqi", "loss", "kl")  # of a profile
PREFERRED = ("kl", "pqi", "loss", "output", "weight")  # for the curve, the first that was measured

DRAWN = "drawn"  # in the place of a file of pairs: the project's scenes
QUESTIONS = 500  # held-out pairs, unless more or fewer are asked for


def is_requant(method: str | None) -> bool:
    """Whether a method string asks for ReQuant."""
    return REQUANT in (method or "").lower().split("+")


def check_measures(names: tuple[str, ...]) -> None:
    """Raises UsageError for measures that there are not, or none at all."""
    if not names:
        raise UsageError(f"--measures: none is given: expected some of {', '.join(MEASURES)}")
    unknown = next((m for m in names if m not in MEASURES), None)
    if unknown is not None:
        raise UsageError(f"--measures: unknown '{unknown}': expected some of {', '.join(MEASURES)}")


def curve_measure(measures: tuple[str, ...]) -> str:
    """What a curve is of when nobody says: the measure that is nearest to a whole plan's KL divergence."""
    found = next((m for m in (*PREFERRED, *measures) if m in measures), None)
    if found is None:
        raise UsageError("--pareto: the profile has no measure: give --measures at least one")
    return found
