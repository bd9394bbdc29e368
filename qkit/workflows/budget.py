"""The work behind ``qkit quantize --bits 3.5``: from a budget to rules, before anything is planned.

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
    apply_bounds,
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
from qkit.allocation.refine import Refinement, refine
from qkit.errors import BadInput, UsageError
from qkit.families.ends import EMBEDDINGS, HEAD
from qkit.families.structure import ModelStructure
from qkit.kvcache.policy import CacheRequest
from qkit.planning.ends import end_plans
from qkit.planning.recipe import AUTO, Recipe
from qkit.planning.request import Request
from qkit.planning.sizes import linear_bytes
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.profile import FILE, KEPT, Profile
from qkit.sensitivity.units import recorded_parts, units_of
from qkit.system.extras import require
from qkit.system.progress import Progress
from qkit.tensor.formats import scheme as scheme_of
from qkit.workflows import kv_cache
from qkit.workflows.engine_candidates import loadable_choices
from qkit.workflows.kv_cache import CacheChoices, CachePlan, joint_choices
from qkit.workflows.profile import ProfileRequest, plan_measurement, profile, profile_from_shapes
from qkit.workflows.quantize import open_structure

NOTHING_ELSE = "the budget keeps every layer of the blocks in full precision beside the {}: use a smaller budget"
NOTHING = "the budget keeps every layer in full precision: use a smaller budget"


@dataclass(frozen=True, kw_only=True)
class BudgetAllocation:
    """A request with a format for every layer.

    request: with the rules of the allocation; table: what its time was counted with, under a latency budget;
    running, cache: bytes of KV cache and of activations, and the cache, under a memory budget.
    """

    request: Request
    profile: Profile
    allocation: Allocation
    refined: Refinement | None
    table: LatencyTable | None = None
    running: tuple[int, int] | None = None
    cache: CachePlan | None = None


@dataclass(frozen=True, kw_only=True)
class AllocationProblem:
    """A budget with everything that its solution needs; it is known that it can be met.

    profile: what was measured, or the same with costs of 0
    profile_request: what the profile is to be made of, None where it is there
    choices: the profile within floors and ceilings
    running: bytes of a plain KV cache and of activations, under a memory budget
    cache: what the cache that shares the memory offers
    beside: bytes that are not the layers' own, at the least and at the most
    """

    structure: ModelStructure
    profile: Profile
    profile_request: ProfileRequest | None
    choices: Profile
    table: LatencyTable | None
    latency: Latency | None
    running: tuple[int, int]
    cache: CacheChoices | None
    beside: tuple[int, int]
    reach: Reach | None

    @property
    def solvable(self) -> bool:
        """Whether the plan of least cost can be found without measuring."""
        return self.profile_request is None and not (self.cache is not None and self.cache.chooses)


def allocation_problem(request: Request, budget_request: BudgetRequest) -> AllocationProblem:
    """The problem that a budget poses; reads no weight and measures nothing. Raises UsageError where request and budget
    exclude each other, Unsupported for a budget that no choice meets, BadInput for another model's profile."""
    if request.scheme is not None or request.recipe is not None:
        raise UsageError("a budget chooses the scheme of every layer: leave --scheme and --recipe out")
    if request.outliers is not None or request.significant is not None or request.rank is not None:
        raise UsageError(
            "a budget also chooses the sparse and low-rank parts of every layer: leave --outliers, --rank and "
            "--significant out and add candidates such as int3+0.5% or int3+r16"
        )
    structure = open_structure(request.model, "a budget", adapter=request.adapter)
    table = None if budget_request.budget.latency is None else LatencyTable.load(budget_request.budget.latency[1])
    profile_request = _missing_profile(request, budget_request)
    known_profile = (
        Profile.load(budget_request.profile) if profile_request is None else profile_from_shapes(profile_request)
    )
    _refuse_another(known_profile, budget_request, request, structure)
    untied = "rotate" in (request.method or known_profile.request["method"]).split("+") and bool(structure.tied)
    saved = _saved_by_ends(request, structure, untied)
    known_profile = replace(known_profile, fixed_bytes=known_profile.fixed_bytes - saved)
    latency = None
    if table is not None and budget_request.budget.latency is not None:
        latency = Latency(budget_request.budget.latency[0], unit_times(known_profile, structure, table, request.model))
    offered = loadable_choices(known_profile, structure, request, tuple(recorded_parts(known_profile.request)))
    choices = apply_bounds(offered, budget_request.floors, budget_request.ceilings)
    running, cache = running_bytes(structure, budget_request.budget.context), _shared_cache(request, budget_request)
    cache_bytes = (running[0], running[0]) if cache is None else (cache.least, cache.most)
    headers = _header_bytes(known_profile, structure)
    other_bytes = (
        (cache_bytes[0] + running[1], cache_bytes[1] + running[1])
        if budget_request.budget.size is None
        else (headers, headers)
    )
    refuse_too_small(
        choices, budget_request.budget, other_bytes[0], bool(budget_request.floors), measured=profile_request is None
    )
    if profile_request is not None:  # what solving will refuse is refused before hours of measuring
        limit = limit_bytes(known_profile, budget_request.budget, other_bytes[0])
        allocate(choices, limit, budget_request.measure, latency)
        unquantized_bytes = [u.choices["keep"].bytes for u in choices.units if "keep" in u.choices]
        if latency is None and len(unquantized_bytes) == len(choices.units) and sum(unquantized_bytes) <= (limit or 0):
            raise UsageError(NOTHING)
    return AllocationProblem(
        structure=structure,
        profile=known_profile,
        profile_request=profile_request,
        choices=choices,
        table=table,
        latency=latency,
        running=running,
        cache=cache,
        beside=other_bytes,
        reach=reach(choices, budget_request.budget, other_bytes),
    )


def _missing_profile(request: Request, budget_request: BudgetRequest) -> ProfileRequest | None:
    """What the profile is to be made of; None where there is one. Raises UsageError for one that was named and is not there."""
    if (budget_request.profile / FILE).is_file():
        return None
    if budget_request.named and budget_request.candidates is None:
        raise UsageError(
            f"{budget_request.profile}: no profile there: run 'qkit profile --out {budget_request.profile} ..', "
            "or add --candidates to measure it now"
        )
    return ProfileRequest(_without_transforms(request), budget_request.candidates or CANDIDATES)


def allocate_budget(request: Request, budget_request: BudgetRequest, progress: Progress) -> BudgetAllocation:
    """The solution of a budget; measures what there is to measure. Raises as ``allocation_problem``."""
    require("choosing formats for a budget", "allocation", "scipy")
    problem = allocation_problem(request, budget_request)
    if problem.profile_request is not None:
        profile(problem.profile_request, budget_request.profile, progress)
        problem = allocation_problem(request, budget_request)
    cache = (
        None
        if budget_request.cache is None
        else _resolve_cache(request, budget_request, budget_request.cache, problem, progress)
    )
    first = solve_budget(request, budget_request, problem, cache)
    if not budget_request.evaluations:
        return first
    other_measures = [m for m in problem.profile.measures if m != budget_request.measure]
    limit, latency = first.allocation.limit, problem.latency
    starts = [first.allocation, *(allocate(problem.choices, limit, m, latency) for m in other_measures)]
    with plan_measurement(_without_transforms(request), problem.profile, budget_request.profile, progress) as measured:
        refined = refine(problem.choices, starts, measured, budget_request.evaluations, latency)
    return _with_picks(request, budget_request, problem, first.allocation, refined.picks, cache, refined)


def solve_budget(
    request: Request, budget_request: BudgetRequest, problem: AllocationProblem, cache: CachePlan | None = None
) -> BudgetAllocation:
    """The allocation of least predicted cost. cache: of a memory that is shared with it; None: a plain one."""
    other_bytes = problem.beside[0]
    if cache is not None and problem.cache is not None:
        other_bytes += cache.bytes - problem.cache.least
    limit = limit_bytes(problem.profile, budget_request.budget, other_bytes)
    first = allocate(problem.choices, limit, budget_request.measure, problem.latency)
    return _with_picks(request, budget_request, problem, first, first.picks, cache, None)


def _with_picks(
    request: Request,
    budget_request: BudgetRequest,
    problem: AllocationProblem,
    first: Allocation,
    picks: dict[str, str],
    cache: CachePlan | None,
    refined: Refinement | None,
) -> BudgetAllocation:
    known_profile, latency = problem.profile, problem.latency
    parts = recorded_parts(known_profile.request)
    ends = [u for u in units_of(problem.structure, parts) if u.is_end]
    keys = {u.key for u in ends}
    formats = {u.part: f"int{scheme_of(name).weights.bits}" for u in ends if (name := picks[u.key]) != KEPT}
    chosen = rules(replace(known_profile, units=tuple(u for u in known_profile.units if u.key not in keys)), picks)
    scheme = next((r["scheme"] for r in chosen if "scheme" in r), None)
    if scheme is None:
        raise UsageError(NOTHING_ELSE.format(" and ".join(formats)) if formats else NOTHING)
    used = sum(u.choices[picks[u.key]].bytes for u in known_profile.units)
    time = None if latency is None else latency.of(picks)
    allocation = replace(
        first, picks=picks, bytes=used, cost=cost_of(known_profile, picks, budget_request.measure), time=time
    )
    decided = replace(
        request,
        scheme=scheme,
        method=request.method or known_profile.request["method"],
        group_size=None,
        rules=tuple(chosen),
        outliers=outliers(known_profile, picks),
        rank=ranks(known_profile, picks),
        embeddings=formats.get(EMBEDDINGS, None if request.embeddings == AUTO else request.embeddings),
        head=formats.get(HEAD, None if request.head == AUTO else request.head),
    )
    running = None
    if budget_request.budget.memory is not None:
        running = (problem.running[0] if cache is None else cache.bytes, problem.running[1])
    return BudgetAllocation(
        request=decided,
        profile=known_profile,
        allocation=allocation,
        refined=refined,
        table=problem.table,
        running=running,
        cache=cache,
    )


def _shared_cache(request: Request, budget_request: BudgetRequest) -> CacheChoices | None:
    """What the cache that shares a memory budget offers, without its costs."""
    cache_request, context = budget_request.cache, budget_request.budget.context
    if cache_request is None:
        return None
    if cache_request.length not in (None, context):
        raise UsageError(
            f"--max-length {cache_request.length}: --memory counts the cache at {context} tokens: leave one of "
            "the two out"
        )
    choices = kv_cache.cache_choices(request, replace(cache_request, length=context), joint=True)
    if choices.chooses and budget_request.measure != MEASURE:
        raise UsageError(
            f"--measure {budget_request.measure}: layers are compared with the cache of --kv {cache_request.kv} "
            "by their KL divergence: leave the option out, or use one width"
        )
    return choices


def _resolve_cache(
    request: Request,
    budget_request: BudgetRequest,
    cache_request: CacheRequest,
    problem: AllocationProblem,
    progress: Progress,
) -> CachePlan:
    """The cache of the plan of least cost for weights and cache together: with its bytes set aside, the weights' own optimum
    within the rest is that plan's."""
    cache = joint_choices(request, replace(cache_request, length=budget_request.budget.context), progress)
    widths, finals = cache.policy.widths, cache.policy.widths_of(cache.heads.layers)
    if cache.chooses:
        limits = {"bytes": limit_bytes(problem.profile, budget_request.budget, problem.running[1]) or 0}
        limits |= {} if problem.latency is None else {"nanoseconds": problem.latency.limit}
        weights = choices_of(problem.choices, budget_request.measure, problem.latency)
        picks = solve([*weights, *cache.units], limits).picks[len(weights) :]
        finals = tuple(widths[i] for i in picks)
    return kv_cache.resolve_cache(request, cache, cache_request, finals, progress)


def _refuse_another(
    known_profile: Profile, budget_request: BudgetRequest, request: Request, structure: ModelStructure
) -> None:
    """Raises BadInput or UsageError for a profile of another model, or made with other options than are asked for now."""
    profiled = {n for u in known_profile.units for n in u.linears}
    parts = recorded_parts(known_profile.request)
    expected = {x.name for u in units_of(structure, parts) for x in u.linears}
    for end in (EMBEDDINGS, HEAD):
        asked = getattr(request, end)
        if asked == AUTO and end not in parts:
            raise UsageError(
                f"--{end} {AUTO}: the profile in {budget_request.profile} does not include it: run 'qkit profile --{end}' "
                "into another folder, or name a format"
            )
        if asked not in (None, AUTO) and end in parts:
            raise UsageError(
                f"--{end} {asked}: the profile in {budget_request.profile} includes it, and the budget decides: leave the "
                "option out"
            )
    decided_tower = next((t for t in request.targets or {} if t in parts), None)
    if decided_tower is not None:
        raise UsageError(
            f"--target {decided_tower}: the profile in {budget_request.profile} includes it, and the budget "
            "decides: leave the option out"
        )
    if known_profile.fingerprint != structure.checkpoint.fingerprint() or profiled != expected:
        raise BadInput(
            f"{budget_request.profile}: the profile is of another model: use another --profile, or measure it again"
        )
    if budget_request.candidates is not None:
        names = [c.name for c in parse_candidates(budget_request.candidates, request.group_size)]
        if sorted(names) != sorted(known_profile.candidates):
            raise UsageError(
                f"--candidates {budget_request.candidates}: the profile in {budget_request.profile} has "
                f"{', '.join(known_profile.candidates)}: leave the option out, or use another --profile"
            )
    groups = {g for n, g in known_profile.request["group_sizes"].items() if n.startswith("W") and "A8" not in n}
    if request.group_size is not None and groups and groups != {request.group_size}:
        group_sizes = ", ".join(sorted("the formats' own" if g is None else str(g) for g in groups))
        raise UsageError(
            f"--group-size {request.group_size}: the profile in {budget_request.profile} was made with "
            f"{group_sizes}: leave the option out, or use another --profile"
        )


def _saved_by_ends(request: Request, structure: ModelStructure, untied: bool) -> int:
    """The bytes that embeddings and head save in the formats that the request names; less than 0 where they take more.

    untied: the run makes a head of its own of a tied one, which the profile does not count
    """
    named = {o: text for o in (EMBEDDINGS, HEAD) if (text := getattr(request, o)) not in (None, AUTO)}
    plans = end_plans(Recipe(scheme="w4a16", **named), structure, untied, rows=False) if named else {}
    tensors, tied = structure.checkpoint.tensors, structure.tied
    own_head = next((tensors[shared].nbytes for shared in tied.values()), 0) if untied else 0
    stored = {name: f"{name}.weight" for name in plans}
    return -own_head + sum(
        tensors[tied.get(stored[name], stored[name])].nbytes - linear_bytes(p.weights, None, p.shape, structure.dtype)
        for name, p in plans.items()
    )


def _header_bytes(known_profile: Profile, structure: ModelStructure) -> int:
    """At most so much of the weight files is not tensors: a line of JSON for each, of a name, a dtype, a shape and a place."""
    pieces = 4 + 3 * any(known_profile.request["outliers"].values())  # tensors that a quantized weight is stored as
    pieces += 2 * any(known_profile.request.get("ranks", {}).values())
    names = [n for u in known_profile.units for n in u.linears]
    return sum(len(n) + 100 for n in structure.checkpoint.tensors) + pieces * sum(len(n) + 120 for n in names)


def _without_transforms(request: Request) -> Request:
    """What the probes are made with: the solver of the request, on the weights of the language model as they are."""
    parts = [p for p in (request.method or "gptq").split("+") if p in ("rtn", "gptq")]
    embeddings, head = (AUTO if text == AUTO else None for text in (request.embeddings, request.head))
    return replace(request, method=parts[0] if parts else "rtn", targets=None, embeddings=embeddings, head=head)


def running_bytes(structure: ModelStructure, context: int) -> tuple[int, int]:
    """The bytes of the KV cache and of activations at a context of ``context`` tokens of one sequence, in the checkpoint's
    dtype.

    Keys and values of all blocks; of one block the hidden states, attention inputs and MLP intermediates of a prefill (our
    count: engines add buffers of their own).
    """
    config: Any = structure.text_config
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    live_widths = 2 * config.hidden_size + max(heads * head + 2 * kv, 2 * mlp)
    bytes_per_width = context * structure.dtype.itemsize
    return bytes_per_width * 2 * kv * len(structure.blocks), bytes_per_width * live_widths
