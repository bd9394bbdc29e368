"""From a budget to rules: what ``qkit quantize --bits 3.5`` does before it plans.

Reads a profile (or makes it first), solves for the plan of least predicted cost, measures whole plans if asked to, and
gives the request back with one rule per candidate in use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.allocation.allocate import Allocation, Budget, allocate, limit_bytes, outliers, rules
from qkit.allocation.latency import Latency, LatencyTable, unit_times
from qkit.allocation.pareto import cost_of
from qkit.allocation.refine import Refined, refine
from qkit.errors import BadInput, UsageError
from qkit.families.outline import Outline
from qkit.pipeline import Request, open_outline
from qkit.profiling import ProfileRequest, measured_plans, profile
from qkit.run import Progress
from qkit.sensitivity.profile import FILE, Profile

CANDIDATES = "int2,int3,int4,int8"
MEASURE = "kl"


@dataclass(frozen=True)
class BudgetRequest:
    """floors, ceilings: (glob, candidate); evaluations: of whole plans, 0 for the solved plan as it is;
    candidates: of a profile that is still to be made."""

    budget: Budget
    profile: Path
    candidates: str | None = None
    measure: str = MEASURE
    floors: tuple[tuple[str, str], ...] = ()
    ceilings: tuple[tuple[str, str], ...] = ()
    evaluations: int = 0


@dataclass(frozen=True)
class Allocated:
    """request: with the rules of the allocation; table: what its time was counted with, under a latency budget."""

    request: Request
    profile: Profile
    allocation: Allocation
    refined: Refined | None
    table: LatencyTable | None = None


def allocated(request: Request, wanted: BudgetRequest, progress: Progress) -> Allocated:
    """Solve the budget. Raises UsageError where request and budget exclude each other, BadInput for another model's profile."""
    if request.scheme is not None or request.recipe is not None:
        raise UsageError("a budget chooses the scheme of every layer: leave --scheme and --recipe out")
    if request.outliers is not None or request.significant is not None:
        raise UsageError(
            "a budget chooses the sparse part of every layer too: leave --outliers and --significant out and add candidates "
            "such as int3+0.5%"
        )
    outline = open_outline(request.model)
    table = None if wanted.budget.latency is None else LatencyTable.load(wanted.budget.latency[1])
    if not (wanted.profile / FILE).is_file():
        asked = ProfileRequest(_without_transforms(request), wanted.candidates or CANDIDATES)
        profile(asked, wanted.profile, progress)
    made = Profile.load(wanted.profile)
    if made.fingerprint != outline.checkpoint.fingerprint():
        raise BadInput(f"{wanted.profile}: the profile of another model: choose another --profile, or make it again")
    latency = None
    if table is not None and wanted.budget.latency is not None:
        latency = Latency(wanted.budget.latency[0], unit_times(made, outline, table, request.model))
    limit = limit_bytes(made, wanted.budget, running_bytes(outline, wanted.budget.context))
    measures = (wanted.measure, *(m for m in made.measures if m != wanted.measure)) if wanted.evaluations else ()
    first = allocate(made, limit, wanted.measure, wanted.floors, wanted.ceilings, latency)
    found: Refined | None = None
    picks = first.picks
    if wanted.evaluations:
        if wanted.floors or wanted.ceilings:
            raise UsageError(
                "--refine moves layers freely and would leave --floor and --ceiling behind: give one of them"
            )
        starts = [first, *(allocate(made, limit, m, latency=latency) for m in measures[1:])]
        with measured_plans(_without_transforms(request), made, wanted.profile, progress) as measured:
            found = refine(made, starts, measured, wanted.evaluations, latency)
        picks = found.picks
    chosen = rules(made, picks)
    scheme = next((r["scheme"] for r in chosen if "scheme" in r), None)
    if scheme is None:
        raise UsageError("the budget lets every layer stay as it is: nothing to quantize; lower it")
    used = sum(u.choices[picks[u.key]].bytes for u in made.units)
    time = None if latency is None else latency.of(picks)
    allocation = replace(first, picks=picks, bytes=used, cost=cost_of(made, picks, wanted.measure), time=time)
    method = request.method or made.request["method"]
    decided = replace(
        request, scheme=scheme, method=method, group_size=None, rules=tuple(chosen), outliers=outliers(made, picks)
    )
    return Allocated(decided, made, allocation, found, table)


def _without_transforms(request: Request) -> Request:
    """What the probes are made with: the solver of the request, on the weights as they are."""
    parts = [p for p in (request.method or "gptq").split("+") if p in ("rtn", "gptq")]
    return replace(request, method=parts[0] if parts else "rtn")


def running_bytes(outline: Outline, context: int) -> int:
    """Bytes beside the weights at a context of so many tokens, in the checkpoint's dtype.

    Keys and values of all blocks; of one block the hidden states, attention inputs and MLP intermediates of a prefill (our
    count: engines add buffers of their own).
    """
    config: Any = outline.model.config
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    live = 2 * config.hidden_size + max(heads * head + 2 * kv, 2 * mlp)
    total: int = context * outline.dtype.itemsize * (2 * kv * len(outline.blocks) + live)
    return total
