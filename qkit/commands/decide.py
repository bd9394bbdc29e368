"""From parsed options to a request: what names and shapes decide, what has to be measured first, and the measuring itself.

``plan`` stops before the measuring, ``quantize`` goes on with it; both refuse the same things at the same place.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qkit import ahead, kvplan
from qkit.ahead import Ahead
from qkit.allocation.allocate import Reach, parse_budget
from qkit.budgeting import Allocated, BudgetRequest, allocated, opened, solved
from qkit.commands.budget import NAMES, WAYS, show_allocation
from qkit.commands.cache import cache_request, show_cache
from qkit.commands.common import Reporter, command_line, make_request
from qkit.errors import UsageError
from qkit.kvplan import CacheChoices, CachePlan, CacheRequest, plan_cache
from qkit.requant import begin, is_requant, requanted
from qkit.request import Request
from qkit.sensitivity import targets
from qkit.sensitivity.profile import FILE
from qkit.sensitivity.units import parse_candidates


@dataclass(frozen=True)
class Decided:
    """request: with all that is known; budgeted, cache: the allocation and the KV cache, where they are known; said: decisions
    that nobody asked for, a sentence each.

    Of a plan also: first, what quantize has to measure before it is decided; open: whether that leaves the schemes of the
    layers open; reach: what the formats of a budget of bytes come to, where they are not chosen yet
    """

    request: Request
    budgeted: Allocated | None = None
    cache: CachePlan | None = None
    said: tuple[str, ...] = ()
    first: tuple[Ahead, ...] = ()
    open: bool = False
    reach: Reach | None = None


@dataclass(frozen=True)
class _Asked:
    """A command line, read. budget, cache: where they are asked for; a cache that shares the budget is in the budget."""

    request: Request
    budget: BudgetRequest | None
    cache: CacheRequest | None


@dataclass
class _Look:
    """What is seen of a command line before anything is measured. run: operations of the quantization, where something is
    held against them"""

    decided: Decided
    parts: targets.Open | None = None
    first: list[Ahead] = field(default_factory=list)
    run: float = 0.0


def planned_request(given: dict[str, Any], out: Path) -> Decided:
    """What can be said of parsed options without reading a weight, and what is left to be measured.

    out: beside it goes the profile, where --profile is not given. Raises what ``decided_request`` raises before it measures.
    """
    return _looked(_asked(given, out)).decided


def decided_request(given: dict[str, Any], out: Path, work: Path | None, console: Console) -> Decided:
    """The request of parsed options, with what has to be measured first: the rules of an allocation where a budget is given,
    the outliers of every layer under ReQuant, the KV cache. What cannot be met is refused before anything is measured.

    out: beside it go the profile, where --profile is not given, and the trials; work: the job folder, if not beside it too.
    """
    asked = _asked(given, out)
    look = _looked(asked)
    show_ahead(look.decided, "measured first", console)
    if not look.decided.first:
        return look.decided
    request, budgeted, cache = asked.request, None, look.decided.cache
    reporter = Reporter(console, command_line())
    with reporter.running():
        if asked.budget is not None:
            budgeted = allocated(request, asked.budget, reporter)
            request, cache = budgeted.request, budgeted.cache
        if look.parts is not None:
            found, said = targets.settle(look.parts, reporter)
            request = replace(request, targets=found.targets)
            for sentence in said:
                console.print(Text(sentence))
        if is_requant(request.method):
            request = _searched(request, out, work, console, reporter)
        if asked.cache is not None:
            cache = plan_cache(request, asked.cache, reporter)
    return Decided(_with_cache(request, cache), budgeted, cache, look.decided.said)


def show_ahead(found: Decided, when: str, console: Console) -> None:
    """What was decided without asking, whether a budget can be met, and what is measured. when: the words before it."""
    for sentence in (*found.said, *([] if found.reach is None else [str(found.reach)])):
        console.print(Text(sentence))
    for each in found.first:
        console.print(Text(f"{when}: {each}"))


def show_decided(found: Decided, console: Console) -> None:
    """The allocation and the cache, where there are any."""
    if found.budgeted is not None:
        show_allocation(found.budgeted, console)
    if found.cache is not None:
        show_cache(found.cache, console)


def decided_json(found: Decided) -> dict[str, Any]:
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


def _asked(given: dict[str, Any], out: Path) -> _Asked:
    asked = {name: given.pop(name) for name in NAMES}
    cache = cache_request(given)
    budget = parse_budget(asked["bits"], asked["size"], asked["memory"], asked["latency"])
    request = make_request(given)
    if budget is None:
        for name in ("profile", "candidates", "floors", "ceilings", "refine"):
            if asked[name]:
                raise UsageError(f"--{name.removesuffix('s')} goes with a budget: add {WAYS}")
        return _Asked(request, None, cache)
    if is_requant(request.method):
        raise UsageError(
            "method requant and a budget exclude each other: add sparse formats to --candidates (int3+0.5%)"
        )
    named: Path | None = asked["profile"]
    if named is not None and named.name == FILE and named.is_file():
        named = named.parent
    shared = budget.memory is not None
    wanted = BudgetRequest(
        budget,
        named or out.with_name(out.name + ".profile"),
        asked["candidates"],
        asked["measure"],
        _bounds("--floor", asked["floors"]),
        _bounds("--ceiling", asked["ceilings"]),
        asked["refine"],
        named is not None,
        cache if shared else None,
    )
    return _Asked(request, wanted, None if shared else cache)


def _looked(asked: _Asked) -> _Look:
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
    found = opened(request, wanted)
    kv, look = found.cache, _Look(Decided(request, open=True, reach=found.reach))
    if found.ask is not None:
        profile, look.run = ahead.of_profile(found.ask, wanted.profile)
        look.first.append(profile)
    else:
        cache = None if kv is None else kvplan.with_widths(kv, kv.policy.widths_of(kv.heads.layers))
        budgeted = solved(request, wanted, found, cache)
        if found.solvable:
            look.decided = Decided(_with_cache(budgeted.request, cache), budgeted, cache)
        if wanted.evaluations or not found.solvable or (wanted.cache is not None and wanted.cache.scale_keys):
            look.run = ahead.run_operations(budgeted.request)
    if wanted.cache is not None and kv is not None:
        look.first += _of_cache(look, request, kv, wanted.cache, joint=True)
    if wanted.evaluations:
        rows = found.made.request["rows"]
        look.first.append(ahead.of_refinement(request, found.outline, wanted.evaluations, rows, look.run))
    return look


def _of_request(request: Request) -> _Look:
    searching = is_requant(request.method)
    # Any method that runs rows does to look at the parts beside a language model.
    parts = targets.opened(replace(request, method="gptq") if searching else request)
    request = replace(request, targets=parts.request.targets)
    look = _Look(Decided(request, said=parts.said), parts)
    if parts.left:
        look.first.append(ahead.of_parts(parts))
    if searching:
        begun = begin(request)
        look.first.append(ahead.of_search(begun))
        look.decided = replace(look.decided, request=begun.even)
    return look


def _add_cache(look: _Look, wanted: CacheRequest) -> None:
    """A cache with a memory of its own."""
    request = look.decided.request
    open_ = kvplan.opened(request, wanted)
    if not look.run and (open_.chooses or wanted.scale_keys):
        look.run = ahead.run_operations(request)
    look.first += _of_cache(look, request, open_, wanted, joint=False)
    if not open_.chooses:
        cache = kvplan.with_widths(open_, open_.policy.widths_of(open_.heads.layers))
        look.decided = replace(look.decided, request=_with_cache(request, cache), cache=cache)


def _of_cache(look: _Look, request: Request, open_: CacheChoices, wanted: CacheRequest, joint: bool) -> list[Ahead]:
    found = [ahead.of_cache(request, open_, joint, look.run)] if open_.chooses else []
    return [*found, ahead.of_keys(request, open_, look.run)] if wanted.scale_keys else found


def _with_cache(request: Request, cache: CachePlan | None) -> Request:
    return request if cache is None else replace(request, kv=cache.policy.to_json(), key_exponents=cache.exponents)


def _searched(request: Request, out: Path, work: Path | None, console: Console, reporter: Reporter) -> Request:
    folder, job = out.with_name(out.name + ".requant"), work or out.with_name(out.name + ".job")
    found = requanted(request, folder, job, reporter)
    tried = ", ".join(f"{t:g}: {kl:.5f}" for t, kl in found.divergence.items())
    console.print(f"outliers by sensitivity to the power {found.exponent:g} (KL divergence of each: {tried})")
    return found.request


def _bounds(option: str, items: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for item in items:
        glob, equals, name = item.rpartition("=")
        if not equals or not glob:
            raise UsageError(f"{option} {item}: expected GLOB=FORMAT, for instance '*.down_proj=int4'")
        found.append((glob, parse_candidates(name, None, option)[0].name))
    return tuple(found)
