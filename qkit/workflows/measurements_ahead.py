"""The measurements that come before a request is decided, forecast from names and shapes: no weight is read.

The cost is given in operations of the quantization itself, and for a profile, which can take hours, in seconds on this machine.
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
from qkit.sensitivity.names import FISHER, KL
from qkit.sensitivity.repair import POINTS
from qkit.system.words import duration, times
from qkit.workflows.calibration_rows import calibration_of
from qkit.workflows.kv_cache import CacheChoices, measurement_rows
from qkit.workflows.profile import ProfileRequest, profile_cost
from qkit.workflows.quantize import prepare
from qkit.workflows.requant import StartedSearch, comparison_rows
from qkit.workflows.towers import OpenTowers

_LONG = 3600.0  # seconds of a profile, from which a cheaper measure is named
_QUICK = " ('--measure kl' would run the model for every layer and candidate)"
_CHEAPER = (
    " ('--measure fisher' takes a small part of it; its allocations are a little worse, and it does not see quantized"
    " inputs)"
)


@dataclass(frozen=True)
class UpcomingMeasurement:
    """A measurement that comes before the run. what: is measured; passes: of the model, in words; ratio: its operations in
    those of the quantization itself; seconds: on this machine, where they were estimated; advice: what takes less"""

    what: str
    passes: str
    ratio: float
    seconds: float | None = None
    advice: str = ""

    def __str__(self) -> str:
        """A line for a person."""
        if self.seconds is not None:
            return f"{self.what}: {self.passes}; {duration(self.seconds)} on this machine{self.advice}"
        return f"{self.what}: {self.passes}; about {times(self.ratio)} the operations of the quantization itself"


def run_operations(request: Request) -> float:
    """The operations of the quantization itself; multiply-adds count twice."""
    return sum(prepare(request).forecast.operations.values())


def profile_ahead(ask: ProfileRequest, folder: Path) -> tuple[UpcomingMeasurement, float]:
    """The profile of a budget, and the operations of the quantization behind it."""
    cost = profile_cost(ask)
    what = f"a profile of {ask.candidates} in {folder}, by {', '.join(ask.measures)}, of weights made with {ask.method}"
    ratio = cost.operations / cost.run_operations
    slow = cost.seconds > _LONG and KL in ask.measures
    advice = _CHEAPER if slow else _QUICK if ask.measures == (FISHER,) else ""
    return UpcomingMeasurement(what, cost.passes.work, ratio, cost.seconds, advice), cost.run_operations


def refinement_ahead(
    request: Request, structure: ModelStructure, evaluations: int, rows: int, run: float
) -> UpcomingMeasurement:
    """The measurement of whole plans of a budget, and of the original. rows: that a profile is measured on"""
    tokens = _tokens(calibration_of(request, structure).first(rows))
    passes = f"{evaluations} plans at most, {evaluations + 2} forward passes over {tokens} tokens"
    return UpcomingMeasurement(
        "plans near the best predicted plan",
        passes,
        (evaluations + 2) * pass_operations(structure, tokens) / run,
    )


def search_ahead(search: StartedSearch) -> UpcomingMeasurement:
    """The trials of ReQuant; the one that is kept becomes the run."""
    run = sum(search.first.forecast.operations.values())
    tokens, trials = _tokens(comparison_rows(search.first.plan)), len(search.exponents)
    passes = f"{POINTS} forward and backward and {2 * trials} forward passes over {tokens} tokens"
    one_pass = pass_operations(search.first.structure, tokens)
    work = (trials + 1) * run + (GRADIENTS * POINTS + 2 * trials) * one_pass
    return UpcomingMeasurement(
        "the share of outliers of every layer", f"{trials + 1} runs of the method, {passes}", work / run
    )


def towers_ahead(towers: OpenTowers) -> UpcomingMeasurement:
    """The measurement of the parts beside a language model whose scheme is left open."""
    assert towers.structure is not None and towers.rows is not None
    count, tokens = 1 + len(towers.structure.sequences), _tokens(towers.rows)
    work = count * pass_operations(towers.structure, tokens)
    question = f"whether {' and '.join(towers.undecided)} are quantized (auto)"
    return UpcomingMeasurement(
        question, f"{count} forward passes over {tokens} tokens", work / run_operations(towers.request)
    )


def cache_ahead(request: Request, choices: CacheChoices, joint: bool, run: float) -> UpcomingMeasurement:
    """The measurement of what each width costs in every layer: by KL divergence where the memory is shared with the weights
    (joint), else by gradients."""
    tokens = _tokens(measurement_rows(request, choices))
    count = 1 + choices.heads.layers * len(choices.policy.widths) if joint else 1
    passes = f"{count} forward {'' if joint else 'and backward '}pass{'es' if count > 1 else ''} over {tokens} tokens"
    work = count * (1 if joint else GRADIENTS) * pass_operations(choices.structure, tokens)
    return UpcomingMeasurement(f"cost of the widths of --kv {choices.policy.name} in every layer", passes, work / run)


def keys_ahead(request: Request, choices: CacheChoices, run: float) -> UpcomingMeasurement:
    """The search of scales of keys."""
    tokens, keys = _tokens(measurement_rows(request, choices)), choices.structure.family.keys
    assert keys is not None
    attention_linears = [
        x for b in choices.structure.blocks for x in b.linears if x.param.startswith(f"{keys.attention}.")
    ]
    attention_operations = 2.0 * tokens * sum(x.shape[0] * x.shape[1] for x in attention_linears)
    passes = f"2 forward passes over {tokens} tokens, and every attention {STEPS + 1} times more at most"
    return UpcomingMeasurement(
        "scales of keys",
        passes,
        (2 * pass_operations(choices.structure, tokens) + (STEPS + 1) * attention_operations) / run,
    )


def _tokens(rows: Calibration) -> int:
    size = extent(rows)
    return size.rows * size.length
