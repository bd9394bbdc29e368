"""The work behind ``qkit quantize --bits 3.5``: from a budget to rules, before anything is planned.

Reads a profile (or makes it first), solves for the plan of least predicted cost, measures whole plans if asked to, and
gives the request back with one rule per candidate in use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

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
from qkit.allocation.limits import MEASURE, BudgetRequest
from qkit.allocation.pareto import cost_of
from qkit.allocation.refine import Refinement, refine
from qkit.errors import BadInput, UsageError
from qkit.families.ends import EMBEDDINGS, HEAD
from qkit.families.structure import ModelStructure
from qkit.kvcache.policy import CacheRequest
from qkit.planning.gguf import check_gguf
from qkit.planning.recipe import AUTO, SOURCE, parse_method
from qkit.planning.request import Request, recipe_of
from qkit.sensitivity.candidates import GGUF
from qkit.sensitivity.names import KL, best_measure, check_measures
from qkit.sensitivity.profile import FILE, KEPT, Profile
from qkit.sensitivity.units import profiled_units, recorded_parts
from qkit.system.extras import require
from qkit.system.progress import Progress
from qkit.tensor.formats import GGUF_FORMATS
from qkit.tensor.formats import scheme as scheme_of
from qkit.workflows import kv_cache
from qkit.workflows.budget_bytes import header_bytes, running_bytes, saved_by_ends
from qkit.workflows.engine_candidates import loadable_choices
from qkit.workflows.kv_cache import CacheChoices, CachePlan, joint_choices
from qkit.workflows.probe_requests import candidates_of
from qkit.workflows.profile import ProfileRequest, budget_profile, plan_measurement, profile, profile_from_shapes
from qkit.workflows.quantize import open_structure

NOTHING_ELSE = "the budget keeps every layer of the blocks in full precision beside the {}: use a smaller budget"
NOTHING = "the budget keeps every layer in full precision: use a smaller budget"


@dataclass(frozen=True, kw_only=True)
class BudgetAllocation:
    """A request with a format for every layer.

    request: with the rules of the allocation; folder: of the profile
    table: what its time was counted with, under a latency budget
    running, cache: bytes of KV cache and of activations, and the cache, under a memory budget.
    """

    request: Request
    profile: Profile
    folder: Path
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
    measure: of the profile, that the plan makes small
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
    measure: str

    @property
    def solvable(self) -> bool:
        """Whether the plan of least cost can be found without measuring."""
        return self.profile_request is None and not (self.cache is not None and self.cache.chooses)


def allocation_problem(request: Request, budget_request: BudgetRequest) -> AllocationProblem:
    """The problem that a budget poses; reads no weight and measures nothing. Raises UsageError where request and budget
    exclude each other, Unsupported for a budget that no choice meets, BadInput for another model's profile."""
    if request.scheme is not None or request.recipe is not None:
        raise UsageError(
            "a budget chooses the scheme of every layer: leave --scheme and --recipe out (but a type of GGUF as --scheme asks "
            "for a GGUF file)"
        )
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
    measure = budget_request.measure if budget_request.measure != MEASURE else best_measure(known_profile.measures)
    if known_profile.request.get("gguf"):
        _refuse_for_gguf(request, structure)
    untied = "rotate" in (request.method or known_profile.request["method"]).split("+") and bool(structure.tied)
    saved = saved_by_ends(request, structure, untied)
    known_profile = replace(known_profile, fixed_bytes=known_profile.fixed_bytes - saved)
    latency = None
    if table is not None and budget_request.budget.latency is not None:
        latency = Latency(budget_request.budget.latency[0], unit_times(known_profile, structure, table, request.model))
    offered = loadable_choices(known_profile, structure, request)
    choices = apply_bounds(offered, budget_request.floors, budget_request.ceilings)
    running, cache = (
        running_bytes(structure, budget_request.budget.context),
        _shared_cache(request, budget_request, measure),
    )
    cache_bytes = (running[0], running[0]) if cache is None else (cache.least, cache.most)
    headers = header_bytes(known_profile, structure)
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
        allocate(choices, limit, measure, latency)
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
        measure=measure,
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
    base, names = _without_transforms(request), budget_request.candidates or budget_request.default
    if budget_request.measure == MEASURE:
        shared = budget_request.cache is not None  # with a cache, whose widths are compared by KL divergence
        return ProfileRequest(base, names) if shared else budget_profile(base, names)
    check_measures((budget_request.measure,), "--measure")
    return ProfileRequest(base, names, (budget_request.measure,))  # a quick measure is not to wait for slow ones


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
    other_measures = [m for m in problem.profile.measures if m != problem.measure]
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
    first = allocate(problem.choices, limit, problem.measure, problem.latency)
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
    ends = [u for u in profiled_units(problem.structure, known_profile.request) if u.is_end]
    keys = {u.key for u in ends}
    formats = {u.part: text for u in ends if (text := _end_text(known_profile, picks[u.key])) is not None}
    chosen = rules(replace(known_profile, units=tuple(u for u in known_profile.units if u.key not in keys)), picks)
    scheme = next((r["scheme"] for r in chosen if "scheme" in r), None)
    if scheme is None:
        raise UsageError(NOTHING_ELSE.format(" and ".join(formats)) if formats else NOTHING)
    used = sum(u.choices[picks[u.key]].bytes for u in known_profile.units)
    time = None if latency is None else latency.of(picks)
    allocation = replace(first, picks=picks, bytes=used, cost=cost_of(known_profile, picks, problem.measure), time=time)
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
        folder=budget_request.profile,
        allocation=allocation,
        refined=refined,
        table=problem.table,
        running=running,
        cache=cache,
    )


def _refuse_for_gguf(request: Request, structure: ModelStructure) -> None:
    """Raises for what cannot go into a GGUF file, before hours of measuring."""
    trial = replace(
        request, scheme=next(iter(GGUF_FORMATS)), method=request.method or "gptq", embeddings=None, head=None
    )
    recipe = recipe_of(trial)
    check_gguf(recipe, structure, parse_method(recipe.method)[0], request.kv)


def _end_text(known_profile: Profile, name: str) -> str | None:
    """The format of an end, as its option has it; None leaves it as the source stores it."""
    gguf = bool(known_profile.request.get("gguf"))
    if name == KEPT:
        return SOURCE if gguf else None
    return name.lower() if gguf else f"int{scheme_of(name).weights.bits}"


def _shared_cache(request: Request, budget_request: BudgetRequest, measure: str) -> CacheChoices | None:
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
    if choices.chooses and measure != KL:
        raise UsageError(
            f"--measure {measure}: layers are compared with the cache of --kv {cache_request.kv} "
            "by their KL divergence: leave the option out, use a profile that has kl, or use one width"
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
        weights = choices_of(problem.choices, problem.measure, problem.latency)
        picks = solve([*weights, *cache.units], limits).picks[len(weights) :]
        finals = tuple(widths[i] for i in picks)
    return kv_cache.resolve_cache(request, cache, cache_request, finals, progress)


def _refuse_another(
    known_profile: Profile, budget_request: BudgetRequest, request: Request, structure: ModelStructure
) -> None:
    """Raises BadInput or UsageError for a profile of another model, or made with other options than are asked for now."""
    profiled = {n for u in known_profile.units for n in u.linears}
    parts = recorded_parts(known_profile.request)
    expected = {x.name for u in profiled_units(structure, known_profile.request) for x in u.linears}
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
    if budget_request.default == GGUF and not known_profile.request.get("gguf"):
        raise UsageError(
            f"the profile in {budget_request.profile} has {', '.join(known_profile.candidates)}, which are no types of GGUF: "
            "use another --profile, or leave --scheme out"
        )
    if budget_request.candidates is not None:
        asked_profile = ProfileRequest(request, budget_request.candidates)
        names = [c.name for c in candidates_of(asked_profile, structure)]
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


def _without_transforms(request: Request) -> Request:
    """What the probes are made with: the solver of the request, on the weights of the language model as they are."""
    parts = [p for p in (request.method or "gptq").split("+") if p in ("rtn", "gptq")]
    return replace(request, method=parts[0] if parts else "rtn", targets=None)
