"""From a budget to rules: what ``qkit quantize --bits 3.5`` does before it plans.

Reads a profile (or makes it first), solves for the plan of least predicted cost, measures whole plans if asked to, and
gives the request back with one rule per candidate in use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qkit.allocation.allocate import (
    Allocation,
    Reach,
    allocate,
    bounded,
    choices_of,
    limit_bytes,
    outliers,
    ranks,
    reach,
    refuse_too_small,
    rules,
)
from qkit.allocation.knapsack import solve
from qkit.allocation.latency import Latency, LatencyTable, unit_times
from qkit.allocation.limits import CANDIDATES, MEASURE, BudgetRequest
from qkit.allocation.pareto import cost_of
from qkit.allocation.refine import Refined, refine
from qkit.errors import BadInput, UsageError
from qkit.families.structure import ModelStructure
from qkit.kvcache.policy import CacheRequest
from qkit.planning.request import Request
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.profile import FILE, Profile
from qkit.sensitivity.units import parts_named, units_of
from qkit.system.extras import require
from qkit.system.progress import Progress
from qkit.workflows import kv_cache
from qkit.workflows.kv_cache import CacheChoices, CachePlan, joint_choices
from qkit.workflows.profile import ProfileRequest, measured_plans, of_shapes, profile
from qkit.workflows.quantize import open_structure

NOTHING = "the budget lets every layer stay as it is: nothing to quantize; lower it"


@dataclass(frozen=True, kw_only=True)
class BudgetAllocation:
    """request: with the rules of the allocation; table: what its time was counted with, under a latency budget;
    running, cache: bytes of KV cache and of activations, and the cache, under a memory budget."""

    request: Request
    profile: Profile
    allocation: Allocation
    refined: Refined | None
    table: LatencyTable | None = None
    running: tuple[int, int] | None = None
    cache: CachePlan | None = None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A budget held against shapes and, where there is one, the profile: it can be met.

    made: the profile, or the same with costs of 0; ask: what the profile is to be made of, None where it is there; choices:
    made, within floors and ceilings; running: bytes of a plain KV cache and of activations, under a memory budget; cache: what
    the cache that shares the memory offers; beside: bytes that are not the layers' own, at the least and at the most
    """

    structure: ModelStructure
    made: Profile
    ask: ProfileRequest | None
    choices: Profile
    table: LatencyTable | None
    latency: Latency | None
    running: tuple[int, int]
    cache: CacheChoices | None
    beside: tuple[int, int]
    reach: Reach | None

    @property
    def solvable(self) -> bool:
        """Whether the plan of least cost can be told without measuring."""
        return self.ask is None and not (self.cache is not None and self.cache.chooses)


def opened(request: Request, wanted: BudgetRequest) -> Opened:
    """Look at a budget; reads no weight and measures nothing. Raises UsageError where request and budget exclude each other,
    Unsupported for a budget that no choice meets, BadInput for another model's profile."""
    if request.scheme is not None or request.recipe is not None:
        raise UsageError("a budget chooses the scheme of every layer: leave --scheme and --recipe out")
    if request.outliers is not None or request.significant is not None or request.rank is not None:
        raise UsageError(
            "a budget chooses the sparse and the low-rank part of every layer too: leave --outliers, --rank and "
            "--significant out and add candidates such as int3+0.5% or int3+r16"
        )
    structure = open_structure(request.model, "a budget")
    table = None if wanted.budget.latency is None else LatencyTable.load(wanted.budget.latency[1])
    ask = _unmade(request, wanted)
    made = Profile.load(wanted.profile) if ask is None else of_shapes(ask)
    _refuse_another(made, wanted, request, structure)
    latency = None
    if table is not None and wanted.budget.latency is not None:
        latency = Latency(wanted.budget.latency[0], unit_times(made, structure, table, request.model))
    choices = bounded(made, wanted.floors, wanted.ceilings)
    running, cache = running_bytes(structure, wanted.budget.context), _shared_cache(request, wanted)
    kept = (running[0], running[0]) if cache is None else (cache.least, cache.most)
    headers = _header_bytes(made, structure)
    beside = (kept[0] + running[1], kept[1] + running[1]) if wanted.budget.size is None else (headers, headers)
    refuse_too_small(choices, wanted.budget, beside[0], bool(wanted.floors), measured=ask is None)
    if ask is not None:  # what solving will refuse is refused before hours of measuring
        limit = limit_bytes(made, wanted.budget, beside[0])
        allocate(choices, limit, wanted.measure, latency)
        kept_whole = [u.choices["keep"].bytes for u in choices.units if "keep" in u.choices]
        if latency is None and len(kept_whole) == len(choices.units) and sum(kept_whole) <= (limit or 0):
            raise UsageError(NOTHING)
    return Opened(
        structure=structure,
        made=made,
        ask=ask,
        choices=choices,
        table=table,
        latency=latency,
        running=running,
        cache=cache,
        beside=beside,
        reach=reach(choices, wanted.budget, beside),
    )


def _unmade(request: Request, wanted: BudgetRequest) -> ProfileRequest | None:
    """What the profile is to be made of; None where there is one. Raises UsageError for one that was named and is not there."""
    if (wanted.profile / FILE).is_file():
        return None
    if wanted.named and wanted.candidates is None:
        raise UsageError(
            f"{wanted.profile}: no profile there: make it with 'qkit profile --out {wanted.profile} ..', or add "
            "--candidates to have it made here"
        )
    return ProfileRequest(_without_transforms(request), wanted.candidates or CANDIDATES)


def allocate_budget(request: Request, wanted: BudgetRequest, progress: Progress) -> BudgetAllocation:
    """Measure what there is to measure and solve the budget. Raises as ``opened``."""
    require("choosing formats for a budget", "allocation", "scipy")
    found = opened(request, wanted)
    if found.ask is not None:
        profile(found.ask, wanted.profile, progress)
        found = opened(request, wanted)
    cache = None if wanted.cache is None else _settled_cache(request, wanted, wanted.cache, found, progress)
    first = solved(request, wanted, found, cache)
    if not wanted.evaluations:
        return first
    others = [m for m in found.made.measures if m != wanted.measure]
    limit, latency = first.allocation.limit, found.latency
    starts = [first.allocation, *(allocate(found.choices, limit, m, latency) for m in others)]
    with measured_plans(_without_transforms(request), found.made, wanted.profile, progress) as measured:
        refined = refine(found.choices, starts, measured, wanted.evaluations, latency)
    return _with_picks(request, wanted, found, first.allocation, refined.picks, cache, refined)


def solved(request: Request, wanted: BudgetRequest, found: Opened, cache: CachePlan | None = None) -> BudgetAllocation:
    """The plan of least predicted cost. cache: of a memory that is shared with it; None: a plain one."""
    beside = found.beside[0]
    if cache is not None and found.cache is not None:
        beside += cache.bytes - found.cache.least
    limit = limit_bytes(found.made, wanted.budget, beside)
    first = allocate(found.choices, limit, wanted.measure, found.latency)
    return _with_picks(request, wanted, found, first, first.picks, cache, None)


def _with_picks(
    request: Request,
    wanted: BudgetRequest,
    found: Opened,
    first: Allocation,
    picks: dict[str, str],
    cache: CachePlan | None,
    refined: Refined | None,
) -> BudgetAllocation:
    made, latency = found.made, found.latency
    chosen = rules(made, picks)
    scheme = next((r["scheme"] for r in chosen if "scheme" in r), None)
    if scheme is None:
        raise UsageError(NOTHING)
    used = sum(u.choices[picks[u.key]].bytes for u in made.units)
    time = None if latency is None else latency.of(picks)
    allocation = replace(first, picks=picks, bytes=used, cost=cost_of(made, picks, wanted.measure), time=time)
    decided = replace(
        request,
        scheme=scheme,
        method=request.method or made.request["method"],
        group_size=None,
        rules=tuple(chosen),
        outliers=outliers(made, picks),
        rank=ranks(made, picks),
    )
    running = None
    if wanted.budget.memory is not None:
        running = (found.running[0] if cache is None else cache.bytes, found.running[1])
    return BudgetAllocation(
        request=decided,
        profile=made,
        allocation=allocation,
        refined=refined,
        table=found.table,
        running=running,
        cache=cache,
    )


def _shared_cache(request: Request, wanted: BudgetRequest) -> CacheChoices | None:
    """What the cache that shares a memory budget offers, without its costs."""
    asked, context = wanted.cache, wanted.budget.context
    if asked is None:
        return None
    if asked.length not in (None, context):
        raise UsageError(
            f"--max-length {asked.length}: --memory counts the cache at {context} tokens: leave one of them out"
        )
    found = kv_cache.opened(request, replace(asked, length=context), joint=True)
    if found.chooses and wanted.measure != MEASURE:
        raise UsageError(
            f"--measure {wanted.measure}: layers are weighed against the cache of --kv {asked.kv} by their KL divergence: "
            "leave the option out, or give one width"
        )
    return found


def _settled_cache(
    request: Request, wanted: BudgetRequest, asked: CacheRequest, found: Opened, progress: Progress
) -> CachePlan:
    """The cache of the plan of least cost for weights and cache together: with its bytes set aside, the weights' own optimum
    within the rest is that plan's."""
    open_ = joint_choices(request, replace(asked, length=wanted.budget.context), progress)
    widths, finals = open_.policy.widths, open_.policy.widths_of(open_.heads.layers)
    if open_.chooses:
        limits = {"bytes": limit_bytes(found.made, wanted.budget, found.running[1]) or 0}
        limits |= {} if found.latency is None else {"nanoseconds": found.latency.limit}
        weights = choices_of(found.choices, wanted.measure, found.latency)
        picks = solve([*weights, *open_.units], limits).picks[len(weights) :]
        finals = tuple(widths[i] for i in picks)
    return kv_cache.resolve_cache(request, open_, asked, finals, progress)


def _refuse_another(made: Profile, wanted: BudgetRequest, request: Request, structure: ModelStructure) -> None:
    """Raises BadInput or UsageError for a profile of another model, or made with other options than are asked for now."""
    known = {n for u in made.units for n in u.linears}
    parts = parts_named(made.request)
    own = {x.name for u in units_of(structure, parts) for x in u.linears}
    both = next((t for t in request.targets or {} if t in parts), None)
    if both is not None:
        raise UsageError(
            f"--target {both}: the profile in {wanted.profile} is of it too, and the budget decides: leave the option out"
        )
    if made.fingerprint != structure.checkpoint.fingerprint() or known != own:
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


def _header_bytes(made: Profile, structure: ModelStructure) -> int:
    """At most so much of the weight files is not tensors: a line of JSON for each, of a name, a dtype, a shape and a place."""
    pieces = 4 + 3 * any(made.request["outliers"].values())  # tensors that a quantized weight is stored as
    pieces += 2 * any(made.request.get("ranks", {}).values())
    names = [n for u in made.units for n in u.linears]
    return sum(len(n) + 100 for n in structure.checkpoint.tensors) + pieces * sum(len(n) + 120 for n in names)


def _without_transforms(request: Request) -> Request:
    """What the probes are made with: the solver of the request, on the weights of the language model as they are."""
    parts = [p for p in (request.method or "gptq").split("+") if p in ("rtn", "gptq")]
    return replace(request, method=parts[0] if parts else "rtn", targets=None)


def running_bytes(structure: ModelStructure, context: int) -> tuple[int, int]:
    """(KV cache, activations): bytes at a context of so many tokens of one sequence, in the checkpoint's dtype.

    Keys and values of all blocks; of one block the hidden states, attention inputs and MLP intermediates of a prefill (our
    count: engines add buffers of their own).
    """
    config: Any = structure.text_config
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    live = 2 * config.hidden_size + max(heads * head + 2 * kv, 2 * mlp)
    each = context * structure.dtype.itemsize
    return each * 2 * kv * len(structure.blocks), each * live
