"""The options of a budget, and what is printed of an allocation: shared by quantize and plan."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qkit.allocation.limits import MEASURE
from qkit.commands.common import megabytes, print_wide, wide_table
from qkit.commands.verb import OptionGroup, in_group

if TYPE_CHECKING:
    from qkit.sensitivity.profile import UnitProfile
    from qkit.workflows.budget import BudgetAllocation


def budget_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that let a budget choose the formats."""
    budgets = in_group(OptionGroup.BUDGETS)
    options = [
        budgets(
            "--bits",
            type=float,
            help="Budget in mean bits per weight, scales included. Excludes --size and --memory.",
        ),
        budgets(
            "--size",
            help="Budget in bytes of the weight files or the GGUF file with headers, for instance 90MB (a million bytes each).",
        ),
        budgets(
            "--memory",
            help="Budget for weights, activations and KV cache at a context length, for instance 6GB@32768.",
        ),
        budgets(
            "--latency",
            help="Budget in time, from a table of 'qkit bench', for instance 12ms@table.json. "
            "Can be combined with another budget.",
        ),
        budgets(
            "--profile",
            type=click.Path(path_type=Path),
            help="Folder of a profile by 'qkit profile', measured there if it is missing (default: OUT.profile).",
        ),
        budgets("--candidates", help="Formats to choose from in a new profile, as for 'qkit profile'."),
        budgets(
            "--measure",
            default=MEASURE,
            show_default=True,
            help="Measure of the profile to minimize. auto: the best one of a profile that is there; of a new one kl, or "
            "fisher where kl would take hours.",
        ),
        budgets(
            "--floor",
            "floors",
            multiple=True,
            metavar="GLOB=FORMAT",
            help="Smallest format allowed for matching layers, for instance '*.down_proj=int4', repeatable.",
        ),
        budgets(
            "--ceiling",
            "ceilings",
            multiple=True,
            metavar="GLOB=FORMAT",
            help="Largest format allowed for matching layers, repeatable.",
        ),
        budgets(
            "--refine",
            type=click.IntRange(0),
            default=0,
            help="Maximum number of complete plans to measure; the best one is used.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def show_allocation(budgeted: BudgetAllocation, console: Console) -> None:
    """The chosen formats and their predicted cost."""
    from qkit.allocation.pareto import mean_bits

    profile, a = budgeted.profile, budgeted.allocation
    table = wide_table("format", "layers", "weights (M)", "bytes", title="allocation")
    for name in profile.candidates:
        units = [u for u in profile.units if a.picks[u.key] == name]
        if units:
            linears, weights = sum(len(u.linears) for u in units), sum(u.weights for u in units)
            size = sum(u.choices[name].bytes for u in units)
            table.add_row(name, str(linears), f"{weights / 1e6:.2f}", megabytes(size))
    print_wide(console, table)
    method = profile.request["method"]
    console.print(Text(f"costs: profile {budgeted.folder}, measured with method {method}"), soft_wrap=True)
    most = "" if a.limit is None else f" of {a.limit:,}"
    console.print(
        f"{a.bytes:,}{most} bytes for the layers, {mean_bits(profile, a.bytes):.3f} bits a weight; predicted {a.measure} "
        f"{a.cost:.5g}, optimality gap {a.gap:.2g}"
    )
    if budgeted.table is not None and a.time is not None and a.time_limit is not None:
        t = budgeted.table
        where = f"{t.file}: {t.machine}, {t.device}, {t.threads} threads, {t.dtype}, m = {t.rows}"
        console.print(
            Text(f"{a.time / 1e6:.4g} of {a.time_limit / 1e6:.4g} ms for the products of the layers, by {where}")
        )
    if budgeted.running is not None:
        parts = (profile.fixed_bytes + a.bytes, *budgeted.running)
        names = ("weights", "KV cache", "activations of one block")
        console.print(
            ", ".join(f"{megabytes(n)} {name}" for n, name in zip(parts, names, strict=True)) + ", one sequence"
        )
    if budgeted.request.method is not None and budgeted.request.method != profile.request["method"]:
        console.print(
            Text(f"the costs were measured with {profile.request['method']}, the layers use {budgeted.request.method}")
        )
    noise = sum(c.costs[a.measure] < 0 for u in profile.units for c in u.choices.values())
    if noise > len(profile.units) // 4:
        console.print(Text(f"{noise} costs by {a.measure} are below 0, which is noise: profile with more --rows"))
    if budgeted.refined is not None:
        r = budgeted.refined
        kept = sum(k for _, _, k in r.history)
        console.print(
            f"refined: {len(r.history)} plans measured, {kept} steps kept, KL divergence {r.start:.5g} to {r.end:.5g}"
        )


def explain(budgeted: BudgetAllocation, console: Console) -> None:
    """Every unit: its format, the cost of the others, and the gain of the next larger one per kilobyte."""
    profile, a = budgeted.profile, budgeted.allocation
    shared = _shared_prefix([u.key for u in profile.units])
    title = f"why: {a.measure} of each format, * chosen" + (f" (layers of {shared.rstrip('.')})" if shared else "")
    table = wide_table("layers", "format", *profile.candidates, "next: gain / kB", title=title)
    for unit in profile.units:
        pick = a.picks[unit.key]
        costs = [_cost(unit, n, a.measure, n == pick) for n in profile.candidates]
        beside = f" +{len(unit.linears) - 1}" if len(unit.linears) > 1 else ""
        table.add_row(Text(unit.key[len(shared) :] + beside), pick, *costs, _gain(unit, pick, a.measure))
    print_wide(console, table)


def _shared_prefix(names: list[str]) -> str:
    """The parts that all names begin with, with the dot after them."""
    parts = takewhile(lambda column: len(set(column)) == 1, zip(*(n.split(".") for n in names), strict=False))
    return "".join(f"{column[0]}." for column in parts) if len(names) > 1 else ""


def explanation(budgeted: BudgetAllocation) -> list[dict[str, Any]]:
    """``explain`` as JSON."""
    a = budgeted.allocation
    return [
        {
            "linears": list(u.linears),
            "format": a.picks[u.key],
            "choices": {n: {"bytes": c.bytes, "cost": c.costs[a.measure]} for n, c in u.choices.items()},
        }
        for u in budgeted.profile.units
    ]


def _cost(unit: UnitProfile, name: str, measure: str, chosen: bool) -> str:
    if name not in unit.choices:
        return "-"
    return f"{unit.choices[name].costs[measure]:.3g}" + (" *" if chosen else "")


def _gain(unit: UnitProfile, pick: str, measure: str) -> str:
    from qkit.report.allocation import next_larger

    found = next_larger(unit, pick, measure)
    return "-" if found is None else f"{found[0]}: {found[1]:.3g}"
