"""From what is asked to a request: what names and shapes decide, what has to be measured first, and the measuring itself.

``plan`` stops before the measuring, ``quantize`` goes on with it; both refuse the same things at the same place.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qkit.allocation.allocate import Reach
from qkit.allocation.limits import BudgetRequest
from qkit.commands.asked import QuantizeOptions
from qkit.commands.budget import show_allocation
from qkit.commands.cache import show_cache
from qkit.commands.common import Reporter, command_line
from qkit.errors import UsageError
from qkit.kvcache.policy import CacheRequest
from qkit.planning.request import Request, is_requant
from qkit.workflows import kv_cache, measurements_ahead, towers
from qkit.workflows.budget import BudgetAllocation, allocate_budget, allocation_problem, solve_budget
from qkit.workflows.kv_cache import CacheChoices, CachePlan, plan_cache
from qkit.workflows.measurements_ahead import UpcomingMeasurement
from qkit.workflows.requant import search_outliers, start_search


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """request: with all that is known; budgeted, cache: the allocation and the KV cache, where they are known; said: decisions
    that nobody asked for, a sentence each.

    Of a plan also: first, what quantize has to measure before it is decided; open: whether that leaves the schemes of the
    layers open; reach: what the formats of a budget of bytes come to, where they are not chosen yet
    """

    request: Request
    budgeted: BudgetAllocation | None = None
    cache: CachePlan | None = None
    said: tuple[str, ...] = ()
    first: tuple[UpcomingMeasurement, ...] = ()
    open: bool = False
    reach: Reach | None = None


@dataclass
class _Look:
    """What is seen of a command line before anything is measured. run: operations of the quantization, where something is
    held against them"""

    decided: ResolvedRequest
    parts: towers.OpenTowers | None = None
    first: list[UpcomingMeasurement] = field(default_factory=list)
    run: float = 0.0


def planned_request(asked: QuantizeOptions) -> ResolvedRequest:
    """What can be said of a command without reading a weight, and what is left to be measured. Raises what ``resolve_request``
    raises before it measures."""
    return _looked(asked).decided


def resolve_request(asked: QuantizeOptions, out: Path, work: Path | None, console: Console) -> ResolvedRequest:
    """The request of a command, with what has to be measured first: the rules of an allocation where a budget is given,
    the outliers of every layer under ReQuant, the KV cache. What cannot be met is refused before anything is measured.

    out: beside it go the trials; work: the job folder, if not beside it too.
    """
    look = _looked(asked)
    show_ahead(look.decided, "measured first", console)
    if not look.decided.first:
        return look.decided
    request, budgeted, cache = asked.request, None, look.decided.cache
    reporter = Reporter(console, command_line())
    with reporter.running():
        if asked.budget is not None:
            budgeted = allocate_budget(request, asked.budget, reporter)
            request, cache = budgeted.request, budgeted.cache
        if look.parts is not None:
            found, said = towers.decide_towers(look.parts, reporter)
            request = replace(request, targets=found.targets)
            for sentence in said:
                console.print(Text(sentence))
        if is_requant(request.method):
            request = _searched(request, out, work, console, reporter)
        if asked.cache is not None:
            cache = plan_cache(request, asked.cache, reporter)
    return ResolvedRequest(request=_with_cache(request, cache), budgeted=budgeted, cache=cache, said=look.decided.said)


def show_ahead(found: ResolvedRequest, when: str, console: Console) -> None:
    """What was decided without asking, whether a budget can be met, and what is measured. when: the words before it."""
    for sentence in (*found.said, *([] if found.reach is None else [str(found.reach)])):
        console.print(Text(sentence))
    for each in found.first:
        console.print(Text(f"{when}: {each}"))


def show_decided(found: ResolvedRequest, console: Console) -> None:
    """The allocation and the cache, where there are any."""
    if found.budgeted is not None:
        show_allocation(found.budgeted, console)
    if found.cache is not None:
        show_cache(found.cache, console)


def decided_json(found: ResolvedRequest) -> dict[str, Any]:
    """The machine's copy of ``show_decided`` and ``show_ahead``."""
    data: dict[str, Any] = {}
    if found.budgeted is not None:
        data["allocation"] = asdict(found.budgeted.allocation)
    if found.cache is not None:
        data["kv"] = {"policy": found.cache.policy.to_json(), "bytes": found.cache.bytes}
    if found.reach is not None:
        data["budget"] = asdict(found.reach)
    if found.first:
        data["measured_first"] = [asdict(each) for each in found.first]
    return data


def _looked(asked: QuantizeOptions) -> _Look:
    """Everything that can be refused is refused here."""
    if asked.budget is not None:
        look = _of_budget(asked.request, asked.budget)
    else:
        look = _of_request(asked.request)
    if asked.cache is not None:
        _add_cache(look, asked.cache)
    look.decided = replace(look.decided, first=tuple(look.first))
    return look


def _of_budget(request: Request, wanted: BudgetRequest) -> _Look:
    found = allocation_problem(request, wanted)
    kv, look = found.cache, _Look(ResolvedRequest(request=request, open=True, reach=found.reach))
    if found.profile_request is not None:
        profile, look.run = measurements_ahead.profile_ahead(found.profile_request, wanted.profile)
        look.first.append(profile)
    else:
        cache = None if kv is None else kv_cache.cache_of_widths(kv, kv.policy.widths_of(kv.heads.layers))
        budgeted = solve_budget(request, wanted, found, cache)
        if found.solvable:
            look.decided = ResolvedRequest(request=_with_cache(budgeted.request, cache), budgeted=budgeted, cache=cache)
        if wanted.evaluations or not found.solvable or (wanted.cache is not None and wanted.cache.scale_keys):
            look.run = measurements_ahead.run_operations(budgeted.request)
    if wanted.cache is not None and kv is not None:
        look.first += _of_cache(look, request, kv, wanted.cache, joint=True)
    if wanted.evaluations:
        rows = found.profile.request["rows"]
        look.first.append(
            measurements_ahead.refinement_ahead(request, found.structure, wanted.evaluations, rows, look.run)
        )
    return look


def _of_request(request: Request) -> _Look:
    searching = is_requant(request.method)
    # Any method that runs rows does to look at the parts beside a language model.
    parts = towers.open_towers(replace(request, method="gptq") if searching else request)
    request = replace(request, targets=parts.request.targets)
    look = _Look(ResolvedRequest(request=request, said=parts.notes), parts)
    if parts.undecided:
        look.first.append(measurements_ahead.towers_ahead(parts))
    if searching:
        begun = start_search(request)
        look.first.append(measurements_ahead.search_ahead(begun))
        look.decided = replace(look.decided, request=begun.even)
    return look


def _add_cache(look: _Look, wanted: CacheRequest) -> None:
    """A cache with a memory of its own."""
    request = look.decided.request
    open_ = kv_cache.cache_choices(request, wanted)
    if not look.run and (open_.chooses or wanted.scale_keys):
        look.run = measurements_ahead.run_operations(request)
    look.first += _of_cache(look, request, open_, wanted, joint=False)
    if not open_.chooses:
        cache = kv_cache.cache_of_widths(open_, open_.policy.widths_of(open_.heads.layers))
        look.decided = replace(look.decided, request=_with_cache(request, cache), cache=cache)


def _of_cache(
    look: _Look, request: Request, open_: CacheChoices, wanted: CacheRequest, joint: bool
) -> list[UpcomingMeasurement]:
    found = [measurements_ahead.cache_ahead(request, open_, joint, look.run)] if open_.chooses else []
    return [*found, measurements_ahead.keys_ahead(request, open_, look.run)] if wanted.scale_keys else found


def _with_cache(request: Request, cache: CachePlan | None) -> Request:
    return request if cache is None else replace(request, kv=cache.policy.to_json(), key_exponents=cache.exponents)


def _searched(request: Request, out: Path, work: Path | None, console: Console, reporter: Reporter) -> Request:
    folder, job = out.with_name(out.name + ".requant"), work or out.with_name(out.name + ".job")
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder}: the trials of requant need a folder of this name: move what is there away")
    found = search_outliers(request, folder, job, reporter)
    tried = ", ".join(f"{t:g}: {kl:.5f}" for t, kl in found.divergence.items())
    console.print(f"outliers by sensitivity to the power {found.exponent:g} (KL divergence of each: {tried})")
    return found.request
