"""From options to a request: what names and shapes decide, what has to be measured first, and the measuring itself.

``look_ahead`` measures nothing and refuses everything that can be refused; ``measure_first`` goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qkit.allocation.allocate import Reach
from qkit.allocation.limits import BudgetRequest
from qkit.calibration.dataset import Calibration
from qkit.errors import UsageError
from qkit.kvcache.policy import CacheRequest
from qkit.planning.quality import names_method
from qkit.planning.request import Request, is_requant
from qkit.system.progress import Progress
from qkit.workflows import kv_cache, measurements_ahead, towers
from qkit.workflows.budget import BudgetAllocation, allocate_budget, allocation_problem, solve_budget
from qkit.workflows.kv_cache import CacheChoices, CachePlan, plan_cache
from qkit.workflows.measurements_ahead import UpcomingMeasurement
from qkit.workflows.options import QuantizeOptions
from qkit.workflows.quality import QualityChoice, choose
from qkit.workflows.requant import search_outliers, start_search


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """request: with all that is known; budgeted, cache: the allocation and the KV cache, where they are known; said: decisions
    that nobody asked for, a sentence each; quality: the method that ``--quality`` chose, None where the request names one.

    Of a plan also: first, what quantize has to measure before it is decided; open: whether that leaves the schemes of the
    layers open; reach: what the formats of a budget of bytes come to, where they are not chosen yet
    """

    request: Request
    budgeted: BudgetAllocation | None = None
    cache: CachePlan | None = None
    said: tuple[str, ...] = ()
    quality: QualityChoice | None = None
    first: tuple[UpcomingMeasurement, ...] = ()
    open: bool = False
    reach: Reach | None = None

    @property
    def rows(self) -> Calibration | None:
        """The calibration rows, where they were made already."""
        return None if self.quality is None else self.quality.chosen.rows


@dataclass
class Look:
    """What is seen of a command line before anything is measured. request: with its method; run: operations of the
    quantization, where something is held against them"""

    request: Request
    decided: ResolvedRequest
    parts: towers.OpenTowers | None = None
    first: list[UpcomingMeasurement] = field(default_factory=list)
    run: float = 0.0


def look_ahead(options: QuantizeOptions) -> Look:
    """What can be said of options without reading a weight, and what is left to be measured. Everything that can be refused is
    refused here."""
    if options.budget is not None:
        look = _of_budget(options.request, options.budget)
        if look.decided.budgeted is not None:
            look.decided = _of_quality(look.decided, options)
    else:
        look = _of_request(options)
    if options.cache is not None:
        _add_cache(look, options.cache)
    look.decided = replace(look.decided, first=tuple(look.first))
    return look


def measure_first(
    look: Look,
    options: QuantizeOptions,
    out: Path,
    work: Path | None,
    progress: Progress,
    say: Callable[[str], object] = lambda sentence: None,
) -> ResolvedRequest:
    """The request with what has to be measured before it can be planned: the rules of an allocation where a budget is given,
    the outliers of every layer under ReQuant, the KV cache.

    out: beside it go the trials; work: the job folder, if not beside it too; say: gets a sentence for each decision
    """
    if not look.decided.first:
        return look.decided
    request, budgeted, cache = look.request, None, look.decided.cache
    decided = look.decided
    if options.budget is not None:
        budgeted = allocate_budget(request, options.budget, progress)
        decided = _of_quality(ResolvedRequest(request=budgeted.request, budgeted=budgeted), options)
        request, cache = decided.request, budgeted.cache
    if look.parts is not None:
        settled, sentences = towers.decide_towers(look.parts, progress)
        request = replace(request, targets=settled.targets)
        for sentence in sentences:
            say(sentence)
    if is_requant(request.method):
        request = _searched(request, out, work, progress, say)
    if options.cache is not None:
        cache = plan_cache(request, options.cache, progress)
    return ResolvedRequest(
        request=_with_cache(request, cache),
        budgeted=budgeted,
        cache=cache,
        said=look.decided.said,
        quality=decided.quality,
    )


def _of_quality(decided: ResolvedRequest, options: QuantizeOptions) -> ResolvedRequest:
    """An allocation with the method of the level, where the command line names none."""
    if names_method(options.request):
        return decided
    request, choice = choose(replace(decided.request, method=None), options.quality)
    return replace(decided, request=request, quality=choice)


def _of_budget(request: Request, budget: BudgetRequest) -> Look:
    problem = allocation_problem(request, budget)
    kv, look = problem.cache, Look(request, ResolvedRequest(request=request, open=True, reach=problem.reach))
    if problem.profile_request is not None:
        profile, look.run = measurements_ahead.profile_ahead(problem.profile_request, budget.profile)
        look.first.append(profile)
    else:
        cache = None if kv is None else kv_cache.cache_of_widths(kv, kv.policy.widths_of(kv.heads.layers))
        budgeted = solve_budget(request, budget, problem, cache)
        if problem.solvable:
            look.decided = ResolvedRequest(request=_with_cache(budgeted.request, cache), budgeted=budgeted, cache=cache)
        if budget.evaluations or not problem.solvable or (budget.cache is not None and budget.cache.scale_keys):
            look.run = measurements_ahead.run_operations(budgeted.request)
    if budget.cache is not None and kv is not None:
        look.first += _of_cache(look, request, kv, budget.cache, joint=True)
    if budget.evaluations:
        rows = problem.profile.request["rows"]
        look.first.append(
            measurements_ahead.refinement_ahead(request, problem.structure, budget.evaluations, rows, look.run)
        )
    return look


def _of_request(options: QuantizeOptions) -> Look:
    request, choice = options.request, None
    if not names_method(request):
        request, choice = choose(request, options.quality)
    searching = is_requant(request.method)
    # Any method that runs rows does to look at the parts beside a language model.
    parts = towers.open_towers(replace(request, method="gptq") if searching else request)
    request = replace(request, targets=parts.request.targets)
    look = Look(request, ResolvedRequest(request=request, said=parts.notes, quality=choice), parts)
    if parts.undecided:
        look.first.append(measurements_ahead.towers_ahead(parts))
    if searching:
        begun = start_search(request)
        look.first.append(measurements_ahead.search_ahead(begun))
        look.decided = replace(look.decided, request=begun.even)
    return look


def _add_cache(look: Look, cache_request: CacheRequest) -> None:
    """A cache with a memory of its own."""
    request = look.decided.request
    open_ = kv_cache.cache_choices(request, cache_request)
    if not look.run and (open_.chooses or cache_request.scale_keys):
        look.run = measurements_ahead.run_operations(request)
    look.first += _of_cache(look, request, open_, cache_request, joint=False)
    if not open_.chooses:
        cache = kv_cache.cache_of_widths(open_, open_.policy.widths_of(open_.heads.layers))
        look.decided = replace(look.decided, request=_with_cache(request, cache), cache=cache)


def _of_cache(
    look: Look, request: Request, open_: CacheChoices, wanted: CacheRequest, joint: bool
) -> list[UpcomingMeasurement]:
    found = [measurements_ahead.cache_ahead(request, open_, joint, look.run)] if open_.chooses else []
    return [*found, measurements_ahead.keys_ahead(request, open_, look.run)] if wanted.scale_keys else found


def _with_cache(request: Request, cache: CachePlan | None) -> Request:
    return request if cache is None else replace(request, kv=cache.policy.to_json(), key_exponents=cache.exponents)


def _searched(
    request: Request, out: Path, work: Path | None, progress: Progress, say: Callable[[str], object]
) -> Request:
    folder, job = out.with_name(out.name + ".requant"), work or out.with_name(out.name + ".job")
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder}: the trials of requant need a folder of this name: move what is there away")
    found = search_outliers(request, folder, job, progress)
    tried = ", ".join(f"{t:g}: {kl:.5f}" for t, kl in found.divergence.items())
    say(f"outliers by sensitivity to the power {found.exponent:g} (KL divergence of each: {tried})")
    return found.request
