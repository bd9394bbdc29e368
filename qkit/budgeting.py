"""From a budget to rules: what ``qkit quantize --bits 3.5`` does before it plans.

Reads a profile (or makes it first), solves for the plan of least predicted cost, measures whole plans if asked to, and
gives the request back with one rule per candidate in use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.allocation.allocate import (
    Allocation,
    allocate,
    bounded,
    choices_of,
    limit_bytes,
    outliers,
    ranks,
    refuse_too_small,
    rules,
)
from qkit.allocation.knapsack import solve
from qkit.allocation.latency import Latency, LatencyTable, unit_times
from qkit.allocation.limits import CANDIDATES, MEASURE, Budget
from qkit.allocation.pareto import cost_of
from qkit.allocation.refine import Refined, refine
from qkit.errors import BadInput, UsageError
from qkit.families.outline import Outline
from qkit.kvcache.policy import CacheRequest
from qkit.kvplan import CachePlan, joint_choices, settled
from qkit.pipeline import open_outline
from qkit.profiling import ProfileRequest, measured_plans, profile
from qkit.request import Request
from qkit.run import Progress
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.profile import FILE, Profile
from qkit.sensitivity.units import parts_named, units_of


@dataclass(frozen=True)
class BudgetRequest:
    """floors, ceilings: (glob, candidate); evaluations: of whole plans, 0 for the solved plan as it is;
    candidates: of a profile that is still to be made; named: whether the user said where the profile is; cache: the KV cache
    that a memory budget is shared with."""

    budget: Budget
    profile: Path
    candidates: str | None = None
    measure: str = MEASURE
    floors: tuple[tuple[str, str], ...] = ()
    ceilings: tuple[tuple[str, str], ...] = ()
    evaluations: int = 0
    named: bool = False
    cache: CacheRequest | None = None


@dataclass(frozen=True)
class Allocated:
    """request: with the rules of the allocation; table: what its time was counted with, under a latency budget;
    running, cache: bytes of KV cache and of activations, and the cache, under a memory budget."""

    request: Request
    profile: Profile
    allocation: Allocation
    refined: Refined | None
    table: LatencyTable | None = None
    running: tuple[int, int] | None = None
    cache: CachePlan | None = None


def allocated(request: Request, wanted: BudgetRequest, progress: Progress) -> Allocated:
    """Solve the budget. Raises UsageError where request and budget exclude each other, BadInput for another model's profile."""
    if request.scheme is not None or request.recipe is not None:
        raise UsageError("a budget chooses the scheme of every layer: leave --scheme and --recipe out")
    if request.outliers is not None or request.significant is not None or request.rank is not None:
        raise UsageError(
            "a budget chooses the sparse and the low-rank part of every layer too: leave --outliers, --rank and "
            "--significant out and add candidates such as int3+0.5% or int3+r16"
        )
    outline = open_outline(request.model, "a budget")
    table = None if wanted.budget.latency is None else LatencyTable.load(wanted.budget.latency[1])
    if not (wanted.profile / FILE).is_file():
        if wanted.named and wanted.candidates is None:
            raise UsageError(
                f"{wanted.profile}: no profile there: make it with 'qkit profile --out {wanted.profile} ..', or add "
                "--candidates to have it made here"
            )
        asked = ProfileRequest(_without_transforms(request), wanted.candidates or CANDIDATES)
        profile(asked, wanted.profile, progress)
    made = Profile.load(wanted.profile)
    _refuse_another(made, wanted, request, outline)
    latency = None
    if table is not None and wanted.budget.latency is not None:
        latency = Latency(wanted.budget.latency[0], unit_times(made, outline, table, request.model))
    running = running_bytes(outline, wanted.budget.context)
    open_ = bounded(made, wanted.floors, wanted.ceilings)
    cache = None
    if wanted.cache is not None:
        cache = _shared_memory(request, wanted, wanted.cache, open_, latency, running[1], progress)
        running = (cache.bytes, running[1])
    beside = _header_bytes(made, outline) if wanted.budget.size is not None else sum(running)
    refuse_too_small(open_, wanted.budget, beside, bool(wanted.floors))
    limit = limit_bytes(made, wanted.budget, beside)
    first = allocate(open_, limit, wanted.measure, latency)
    found: Refined | None = None
    picks = first.picks
    if wanted.evaluations:
        others = [m for m in made.measures if m != wanted.measure]
        starts = [first, *(allocate(open_, limit, m, latency) for m in others)]
        with measured_plans(_without_transforms(request), made, wanted.profile, progress) as measured:
            found = refine(open_, starts, measured, wanted.evaluations, latency)
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
        request,
        scheme=scheme,
        method=method,
        group_size=None,
        rules=tuple(chosen),
        outliers=outliers(made, picks),
        rank=ranks(made, picks),
    )
    return Allocated(
        decided, made, allocation, found, table, running if wanted.budget.memory is not None else None, cache
    )


def _shared_memory(
    request: Request,
    wanted: BudgetRequest,
    asked: CacheRequest,
    made: Profile,
    latency: Latency | None,
    activations: int,
    progress: Progress,
) -> CachePlan:
    """The cache of the plan of least cost for weights and cache together: with its bytes set aside, the weights' own optimum
    within the rest is that plan's."""
    context = wanted.budget.context
    if asked.length not in (None, context):
        raise UsageError(
            f"--max-length {asked.length}: --memory counts the cache at {context} tokens: leave one of them out"
        )
    open_ = joint_choices(request, replace(asked, length=context), progress)
    widths = open_.policy.widths
    refuse_too_small(made, wanted.budget, activations + open_.least, bool(wanted.floors))
    finals = open_.policy.widths_of(open_.heads.layers)
    if len(widths) > 1:
        if wanted.measure != MEASURE:
            raise UsageError(
                f"--measure {wanted.measure}: layers are weighed against the cache of --kv {asked.kv} by their KL divergence: "
                "leave the option out, or give one width"
            )
        limits = {"bytes": limit_bytes(made, wanted.budget, activations) or 0}
        limits |= {} if latency is None else {"nanoseconds": latency.limit}
        weights = choices_of(made, wanted.measure, latency)
        picks = solve([*weights, *open_.units], limits).picks[len(weights) :]
        finals = tuple(widths[i] for i in picks)
    return settled(request, open_, asked, finals, progress)


def _refuse_another(made: Profile, wanted: BudgetRequest, request: Request, outline: Outline) -> None:
    """Raises BadInput or UsageError for a profile of another model, or made with other options than are asked for now."""
    known = {n for u in made.units for n in u.linears}
    parts = parts_named(made.request)
    own = {x.name for u in units_of(outline, parts) for x in u.linears}
    both = next((t for t in request.targets or {} if t in parts), None)
    if both is not None:
        raise UsageError(
            f"--target {both}: the profile in {wanted.profile} is of it too, and the budget decides: leave the option out"
        )
    if made.fingerprint != outline.checkpoint.fingerprint() or known != own:
        raise BadInput(f"{wanted.profile}: the profile of another model: choose another --profile, or make it again")
    if wanted.candidates is not None:
        asked = [c.name for c in parse_candidates(wanted.candidates, request.group_size)]
        if sorted(asked) != sorted(made.candidates):
            raise UsageError(
                f"--candidates {wanted.candidates}: the profile in {wanted.profile} has {', '.join(made.candidates)}: leave "
                "the option out, or choose another --profile"
            )
    groups = {g for n, g in made.request["group_sizes"].items() if n.startswith("W") and "A8" not in n}
    if request.group_size is not None and groups and groups != {request.group_size}:
        found = ", ".join(sorted("the formats' own" if g is None else str(g) for g in groups))
        raise UsageError(
            f"--group-size {request.group_size}: the profile in {wanted.profile} was made with {found}: leave the option "
            "out, or choose another --profile"
        )


def _header_bytes(made: Profile, outline: Outline) -> int:
    """At most so much of the weight files is not tensors: a line of JSON for each, of a name, a dtype, a shape and a place."""
    pieces = 4 + 3 * any(made.request["outliers"].values())  # tensors that a quantized weight is stored as
    pieces += 2 * any(made.request.get("ranks", {}).values())
    names = [n for u in made.units for n in u.linears]
    return sum(len(n) + 100 for n in outline.checkpoint.tensors) + pieces * sum(len(n) + 120 for n in names)


def _without_transforms(request: Request) -> Request:
    """What the probes are made with: the solver of the request, on the weights of the language model as they are."""
    parts = [p for p in (request.method or "gptq").split("+") if p in ("rtn", "gptq")]
    return replace(request, method=parts[0] if parts else "rtn", targets=None)


def running_bytes(outline: Outline, context: int) -> tuple[int, int]:
    """(KV cache, activations): bytes at a context of so many tokens of one sequence, in the checkpoint's dtype.

    Keys and values of all blocks; of one block the hidden states, attention inputs and MLP intermediates of a prefill (our
    count: engines add buffers of their own).
    """
    config: Any = outline.text_config
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    live = 2 * config.hidden_size + max(heads * head + 2 * kv, 2 * mlp)
    each = context * outline.dtype.itemsize
    return each * 2 * kv * len(outline.blocks), each * live
