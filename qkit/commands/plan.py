"""qkit plan: what quantize would do, and what it would cost; reads no weights."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.asked import options_of
from qkit.commands.budget import BUDGETS, WAYS, budget_options, explain, explanation
from qkit.commands.cache import cache_options
from qkit.commands.common import OutFolder, megabytes, request_options, show_coverage, write_json
from qkit.commands.verb import Verb
from qkit.errors import UsageError, write_failure
from qkit.files.safefile import write_atomic
from qkit.system.extras import require

if TYPE_CHECKING:
    from qkit.planning.request import Request
    from qkit.workflows.budget import BudgetAllocation
    from qkit.workflows.quantize import PreparedRequest


def plan_json(found: PreparedRequest) -> dict[str, Any]:
    """The machine's copy of a plan."""
    from qkit.planning.fused_layers import engines_of
    from qkit.workflows.quantize import coverage

    plan = found.plan.to_json()
    return {
        "hash": found.plan.hash,
        "source": {"fingerprint": found.plan.source_fingerprint, "sampled": True},
        "coverage": coverage(found.plan),
        "engines": [asdict(line) for line in engines_of(found.plan, found.structure)],
        "forecast": found.forecast.to_json(),
        "linears": plan["linears"],
        "skipped": plan["skipped"],
        "calibration": plan["calibration"],
        "family": plan["family"],
        "seed": plan["seed"],
        "run_dtype": plan["run_dtype"],
    }


def show_forecast(found: PreparedRequest, console: Console) -> None:
    """Bytes, memory, and the phases that take the time."""
    f = found.forecast
    runs = f"blocks run in {found.plan.run_dtype}; " if found.plan.calibration else ""
    phases = ", ".join(f"{p['phase']} {p['share']:.0%}" for p in f.to_json()["time_dominating"][:3])
    console.print(
        f"forecast: output {megabytes(f.packed_bytes)}, job folder {megabytes(f.job_bytes)}, peak memory "
        f"{megabytes(f.peak_memory)}; {runs}time goes to: {phases}"
    )


def show_method(request: Request, found: PreparedRequest, console: Console) -> dict[str, Any]:
    """The method where nobody chose one, and what a better one costs; gives the machine's copy."""
    from qkit.workflows.advice import on_method

    advice = on_method(request, found)
    if advice is None:
        return {}
    console.print(Text(str(advice)))
    return {"method": asdict(advice)}


def write_figures(found: BudgetAllocation, folder: Path, console: Console) -> None:
    """The pictures and the page of an allocation. Raises UsageError where another file of that name is there already."""
    from qkit.report.allocation import allocation_files

    files = allocation_files(found.profile, found.allocation)
    for name, content in files.items():
        file = folder / name
        if os.path.lexists(file) and not (file.is_file() and file.read_bytes() == content):
            raise UsageError(
                f"--figures {folder}: another {name} is there already: name a new folder, or move that file away"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise write_failure(folder, e) from e
    for name, content in files.items():
        write_atomic(folder / name, content)
    console.print(Text(f"figures: {folder}: {', '.join(files)}"))


@click.command("plan", cls=Verb)
@request_options
@budget_options
@cache_options
@click.option("--explain", "why", is_flag=True, help="Every layer of a budget: the alternatives and what they cost.")
@click.option("--figures", type=click.Path(path_type=Path), help="Folder for pictures and a page of the allocation.")
@click.option("--out", type=OutFolder(), help="Where the result would go (its disk is checked).")
def plan_command(json_file: Path | None, out: Path | None, why: bool, figures: Path | None, **given: Any) -> None:
    """Say what quantize would do: coverage, exact bytes, peak memory, and where the time goes.

    Says what quantize has to measure first, and refuses what cannot fit or cannot be met. Reads no weights: it knows those of
    the model by samples, and quantize reads every byte.

    \b
    Example:
      qkit plan --model tiny-llama --scheme w4a16 --method gptq --json plan.json
    """
    console = Console()
    if figures is not None:
        require("--figures", "report", "matplotlib", "jinja2")
    if (why or figures is not None) and all(given[name] is None for name in BUDGETS):
        raise UsageError(f"{'--explain' if why else '--figures'} goes with a budget: add {WAYS}")
    asked = options_of(given, out or Path(Path(given["model"]).name), console)

    from qkit.commands.decide import decided_json, planned_request, show_ahead, show_decided
    from qkit.engine.forecast import refuse_what_cannot_fit
    from qkit.workflows.quantize import prepare

    decided = planned_request(asked)
    budgeted = decided.budgeted
    if (why or figures is not None) and budgeted is None:
        option = "--explain" if why else "--figures"
        raise UsageError(f"{option} is about what was measured, and nothing is yet: run 'qkit profile' first")
    show_decided(decided, console)
    show_ahead(decided, "measured when quantize runs", console)
    if decided.open:
        write_json(json_file, decided_json(decided))
        return
    found = prepare(decided.request)
    data = {**plan_json(found), **decided_json(decided)}
    if decided.first:
        data["hash"] = None  # what is measured is part of it
    if budgeted is not None:
        data["allocation"]["layers"] = explanation(budgeted)
        if budgeted.table is not None:
            data["allocation"]["table"] = budgeted.table.described()
        if why:
            explain(budgeted, console)
        if figures is not None:
            write_figures(budgeted, figures, console)
    show_coverage(found, console)
    data |= show_method(decided.request, found, console)
    show_forecast(found, console)
    write_json(json_file, data)
    refuse_what_cannot_fit(found.forecast, out or Path.cwd())
