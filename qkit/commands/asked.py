"""What a command asks for, read from its options: names and numbers are checked here, before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qkit.allocation.limits import BudgetRequest, parse_budget
from qkit.commands.budget import NAMES, WAYS
from qkit.commands.cache import cache_request
from qkit.commands.common import announce, make_request
from qkit.errors import UsageError
from qkit.files.locate import find_model
from qkit.kvcache.policy import CacheRequest
from qkit.planning.request import REQUANT, Request, is_requant, recipe_of
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.names import PROFILE


@dataclass(frozen=True)
class QuantizeOptions:
    """A command line, read. budget, cache: where they are asked for; a cache that shares the budget is in the budget."""

    request: Request
    budget: BudgetRequest | None
    cache: CacheRequest | None


def options_of(given: dict[str, Any], out: Path, console: Console) -> QuantizeOptions:
    """The request of parsed options, and the first line of the command.

    out: beside it goes the profile, where --profile is not given. Raises UsageError and BadRecipe for what is wrong with names
    and numbers alone, BadCheckpoint where there is no such model.
    """
    asked = _asked(given, out)
    request = asked.request
    if asked.budget is None or request.scheme or request.recipe:
        parts = [p for p in (request.method or "").lower().split("+") if p and p != REQUANT]
        recipe_of(replace(request, method="+".join(parts) or ("rtn" if is_requant(request.method) else None)))
    if asked.budget is not None and asked.budget.candidates:
        parse_candidates(asked.budget.candidates, request.group_size)
    announce(console, f"reading {request.model}")
    find_model(request.model)
    return asked


def _asked(given: dict[str, Any], out: Path) -> QuantizeOptions:
    asked = {name: given.pop(name) for name in NAMES}
    cache = cache_request(given)
    budget = parse_budget(asked["bits"], asked["size"], asked["memory"], asked["latency"])
    request = make_request(given)
    if budget is None:
        for name in ("profile", "candidates", "floors", "ceilings", "refine"):
            if asked[name]:
                raise UsageError(f"--{name.removesuffix('s')} goes with a budget: add {WAYS}")
        return QuantizeOptions(request, None, cache)
    if is_requant(request.method):
        raise UsageError(
            "method requant and a budget exclude each other: add sparse formats to --candidates (int3+0.5%)"
        )
    named: Path | None = asked["profile"]
    if named is not None and named.name == PROFILE and named.is_file():
        named = named.parent
    shared = budget.memory is not None
    wanted = BudgetRequest(
        budget=budget,
        profile=named or out.with_name(out.name + ".profile"),
        candidates=asked["candidates"],
        measure=asked["measure"],
        floors=_bounds("--floor", asked["floors"]),
        ceilings=_bounds("--ceiling", asked["ceilings"]),
        evaluations=asked["refine"],
        named=named is not None,
        cache=cache if shared else None,
    )
    return QuantizeOptions(request, wanted, None if shared else cache)


def _bounds(option: str, items: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for item in items:
        glob, equals, name = item.rpartition("=")
        if not equals or not glob:
            raise UsageError(f"{option} {item}: expected GLOB=FORMAT, for instance '*.down_proj=int4'")
        found.append((glob, parse_candidates(name, None, option)[0].name))
    return tuple(found)
