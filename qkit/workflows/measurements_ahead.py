"""What has to be measured before a request is decided, told from names and shapes: no weight is read for it.

Seconds depend on the machine, so what measuring takes is held against the operations of the quantization itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qkit.calibration.batches import extent
from qkit.calibration.dataset import Calibration
from qkit.families.structure import ModelStructure
from qkit.kvcache.scaling import STEPS
from qkit.planning.request import Request
from qkit.sensitivity.forecast import GRADIENTS, pass_operations
from qkit.sensitivity.repair import POINTS
from qkit.workflows.advice import times
from qkit.workflows.calibration_rows import calibration_of
from qkit.workflows.kv_cache import CacheChoices, measured_rows
from qkit.workflows.profile import ProfileRequest, foreseen
from qkit.workflows.quantize import prepare
from qkit.workflows.requant import Begun, compared_rows
from qkit.workflows.towers import Open


@dataclass(frozen=True)
class Ahead:
    """what: is measured; passes: of the model, in words; ratio: its operations in those of the quantization itself"""

    what: str
    passes: str
    ratio: float

    def __str__(self) -> str:
        """A line for a person."""
        return f"{self.what}: {self.passes}; about {times(self.ratio)} the operations of the quantization itself"


def run_operations(request: Request) -> float:
    """Of the quantization itself, multiply-adds counted twice."""
    return sum(prepare(request).forecast.operations.values())


def of_profile(ask: ProfileRequest, folder: Path) -> tuple[Ahead, float]:
    """(the profile of a budget, operations of the quantization behind it)"""
    passes, total, run = foreseen(ask)
    return Ahead(f"a profile of {ask.candidates} in {folder}", passes.work, total / run), run


def of_refinement(request: Request, structure: ModelStructure, evaluations: int, rows: int, run: float) -> Ahead:
    """Whole plans of a budget, and the original. rows: that a profile is measured on"""
    tokens = _tokens(calibration_of(request, structure).first(rows))
    passes = f"{evaluations} plans at most, {evaluations + 2} forward passes over {tokens} tokens"
    return Ahead(
        "plans near the best predicted plan",
        passes,
        (evaluations + 2) * pass_operations(structure, tokens) / run,
    )


def of_search(begun: Begun) -> Ahead:
    """The trials of ReQuant; the one that is kept becomes the run."""
    run = sum(begun.first.forecast.operations.values())
    tokens, trials = _tokens(compared_rows(begun.first.plan)), len(begun.exponents)
    also = f"{POINTS} forward and backward and {2 * trials} forward passes over {tokens} tokens"
    once = pass_operations(begun.first.structure, tokens)
    work = (trials + 1) * run + (GRADIENTS * POINTS + 2 * trials) * once
    return Ahead("the share of outliers of every layer", f"{trials + 1} runs of the method, {also}", work / run)


def of_parts(open_: Open) -> Ahead:
    """The parts beside a language model whose scheme is left to measuring."""
    assert open_.structure is not None and open_.rows is not None
    count, tokens = 1 + len(open_.structure.sequences), _tokens(open_.rows)
    work = count * pass_operations(open_.structure, tokens)
    what = f"whether {' and '.join(open_.left)} are quantized (auto)"
    return Ahead(what, f"{count} forward passes over {tokens} tokens", work / run_operations(open_.request))


def of_cache(request: Request, open_: CacheChoices, joint: bool, run: float) -> Ahead:
    """What each width costs in every layer: by KL divergence where the memory is shared with the weights (joint), else by
    gradients."""
    tokens = _tokens(measured_rows(request, open_))
    count = 1 + open_.heads.layers * len(open_.policy.widths) if joint else 1
    passes = f"{count} forward {'' if joint else 'and backward '}pass{'es' if count > 1 else ''} over {tokens} tokens"
    work = count * (1 if joint else GRADIENTS) * pass_operations(open_.structure, tokens)
    return Ahead(f"cost of the widths of --kv {open_.policy.name} in every layer", passes, work / run)


def of_keys(request: Request, open_: CacheChoices, run: float) -> Ahead:
    """The search of scales of keys."""
    tokens, keys = _tokens(measured_rows(request, open_)), open_.structure.family.keys
    assert keys is not None
    inside = [x for b in open_.structure.blocks for x in b.linears if x.param.startswith(f"{keys.attention}.")]
    again = 2.0 * tokens * sum(x.shape[0] * x.shape[1] for x in inside)
    passes = f"2 forward passes over {tokens} tokens, and every attention {STEPS + 1} times more at most"
    return Ahead("scales of keys", passes, (2 * pass_operations(open_.structure, tokens) + (STEPS + 1) * again) / run)


def _tokens(rows: Calibration) -> int:
    found = extent(rows)
    return found.rows * found.length
