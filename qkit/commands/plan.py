"""qkit plan: what quantize would do, and its cost, without reading all weights."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.asked import options_of
from qkit.commands.budget import budget_options, explain, explanation
from qkit.commands.cache import cache_options
from qkit.commands.common import OutFolder, Reporter, command_line, megabytes, request_options, write_json
from qkit.commands.coverage import show_coverage
from qkit.commands.engine_options import engine_options, require_vllm
from qkit.commands.verb import OptionGroup, Verb, in_group
from qkit.errors import UsageError, write_failure
from qkit.files.safefile import write_atomic
from qkit.system.extras import require
from qkit.system.words import duration
from qkit.verification.model_engines import engine_lines

if TYPE_CHECKING:
    from qkit.verification.engine_types import Selected
    from qkit.workflows.budget import BudgetAllocation
    from qkit.workflows.quality import QualityChoice
    from qkit.workflows.quantize import PreparedRequest


def plan_json(
    prepared: PreparedRequest, selected: Selected | None = None, seconds: dict[str, float] | None = None
) -> dict[str, Any]:
    """A plan as JSON. selected: what vLLM's own code said of it, where it was asked; seconds: what each phase takes here, where
    that was estimated"""
    from qkit.planning.fused_layers import engine_rows_of
    from qkit.workflows.quantize import coverage

    plan = prepared.plan.to_json()
    rows = engine_rows_of(prepared.plan, prepared.structure, selected)
    return {
        "hash": prepared.plan.hash,
        "source": {"fingerprint": prepared.plan.source_fingerprint, "sampled": True},
        "coverage": coverage(prepared.plan),
        "engines": [asdict(line) for line in engine_lines(rows)],
        "engine_rows": [asdict(row) for row in rows],
        "forecast": {**prepared.forecast.to_json(), **({} if seconds is None else _times(seconds))},
        "linears": plan["linears"],
        "skipped": plan["skipped"],
        "calibration": plan["calibration"],
        "family": plan["family"],
        "seed": plan["seed"],
        "run_dtype": plan["run_dtype"],
        "device": plan["device"],
    }


def _times(seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_phase": {phase: round(value, 1) for phase, value in seconds.items()},
    }


def estimated_seconds(prepared: PreparedRequest, threads: int | None) -> dict[str, float] | None:
    """What each phase takes on this machine; None for a pipeline, whose calibration samples it, and where nothing is
    quantized, and on a GPU, of which no rates are measured."""
    if prepared.structure.family.streams is not None or prepared.components or not prepared.plan.linears:
        return None
    if prepared.plan.device != "cpu":
        return None
    from qkit.engine.duration import seconds_by_phase
    from qkit.system.machine import available_cores

    return seconds_by_phase(prepared.plan, prepared.forecast, threads or available_cores())


def show_forecast(prepared: PreparedRequest, console: Console, seconds: dict[str, float] | None = None) -> None:
    """Bytes, memory, time where it was estimated, and the phases that take it."""
    f = prepared.forecast
    costs = seconds or f.operations
    total = sum(costs.values()) or 1.0
    largest = sorted(costs.items(), key=lambda item: -item[1])[:3]
    device = "" if prepared.plan.device == "cpu" else f" on {prepared.plan.device}"
    runs = f"blocks run in {prepared.plan.run_dtype}{device}; " if prepared.plan.calibration else ""
    phases = ", ".join(f"{phase} {cost / total:.0%}" for phase, cost in largest if cost)
    about = "" if seconds is None else f", about {duration(sum(seconds.values()))} on this machine"
    console.print(
        f"forecast for method {prepared.plan.recipe['method']}: output {megabytes(f.packed_bytes)}, job folder "
        f"{megabytes(f.job_bytes)}, peak memory {megabytes(f.peak_memory)}{about}; {runs}time goes to: {phases}"
    )
    if f.trial_memory:
        console.print(
            "the forecast takes the blocks to run one after another; where a trial of one sample shows that they cannot, their "
            f"inputs are recorded in runs of the whole model: up to {megabytes(f.trial_job_bytes)} more in the job folder, and "
            f"{megabytes(f.trial_memory)} of memory"
        )


def _show_next(quality: QualityChoice, threads: int | None, console: Console) -> float | None:
    """The time of the next level of quality, and its seconds; None where it cannot be estimated."""
    assert quality.above is not None
    seconds = estimated_seconds(quality.above.prepared, threads)
    if seconds is None:
        return None
    total = sum(seconds.values())
    console.print(f"--quality {quality.next_level} would take about {duration(total)} on this machine")
    return round(total, 1)


def write_figures(budgeted: BudgetAllocation, folder: Path, console: Console) -> None:
    """The figures and the page of an allocation. Raises UsageError where another file of that name exists."""
    from qkit.report.allocation import allocation_files

    files = allocation_files(budgeted.profile, budgeted.allocation)
    for name, content in files.items():
        file = folder / name
        if os.path.lexists(file) and not (file.is_file() and file.read_bytes() == content):
            raise UsageError(
                f"--figures {folder}: another {name} is there already: use a new folder, or move that file away"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise write_failure(folder, e) from e
    for name, content in files.items():
        write_atomic(folder / name, content)
    console.print(Text(f"figures: {folder}: {', '.join(files)}"))


def _ask(prepared: PreparedRequest, python: Path, console: Console) -> Selected:
    """What vLLM's own code says of a plan."""
    from qkit.engines.selector import parse_gpus
    from qkit.workflows.asked_engine import ask_plan

    reporter = Reporter(console, command_line())
    with reporter.running():
        gpus = parse_gpus(prepared.plan.recipe["gpu"])
        return ask_plan(prepared.plan, prepared.structure, python, reporter, gpus)


@click.command("plan", cls=Verb)
@request_options
@budget_options
@cache_options
@engine_options
@in_group(OptionGroup.ENGINE)(
    "--python",
    type=click.Path(path_type=Path),
    help="Python interpreter with vLLM, for --engine vllm: its own code is asked what it selects. Nothing is run.",
)
@in_group(OptionGroup.BUDGETS)(
    "--explain", "why", is_flag=True, help="Print every layer with the formats to choose from and their costs."
)
@in_group(OptionGroup.BUDGETS)(
    "--figures", type=click.Path(path_type=Path), help="Folder for figures of the allocation."
)
@in_group(OptionGroup.MOST_USED)(
    "--out", type=OutFolder(), help="Planned folder of the result, to check its free disk space."
)
def plan_command(
    json_file: Path | None,
    out: Path | None,
    why: bool,
    figures: Path | None,
    python: Path | None,
    **values: Any,
) -> None:
    """Show what quantize would do: coverage, exact bytes, peak memory, and the phases that take the time.

    The plan lists what quantize has to measure first. It refuses a budget that cannot be met and a job that cannot fit. The
    command reads samples of the weights, whereas quantize reads every byte.

    \b
    Example:
      qkit plan --model tiny-llama --scheme w4a16 --method gptq --json plan.json
    """
    from qkit.workflows.options import BUDGETS, WAYS  # here: the help does not wait for pydantic

    console = Console()
    require_vllm(values["engine"], python)
    if figures is not None:
        require("--figures", "report", "matplotlib", "jinja2")
    if (why or figures is not None) and all(values[name] is None for name in BUDGETS):
        raise UsageError(f"{'--explain' if why else '--figures'} goes with a budget: add {WAYS}")
    options = options_of(values, out or Path(Path(values["model"]).name), console)

    from qkit.commands.decide import decided_json, show_ahead, show_decided
    from qkit.engine.forecast import refuse_what_cannot_fit
    from qkit.workflows.quantize import prepare
    from qkit.workflows.resolve import look_ahead

    decided = look_ahead(options).decided
    budgeted = decided.budgeted
    if (why or figures is not None) and budgeted is None:
        option = "--explain" if why else "--figures"
        raise UsageError(f"{option} needs a profile, and there is none yet: run 'qkit profile' first")
    show_decided(decided, console)
    show_ahead(decided, "measured when quantize runs", console)
    if decided.open:
        write_json(json_file, decided_json(decided))
        return
    prepared = prepare(decided.request, decided.rows)
    selected = None if python is None else _ask(prepared, python, console)
    seconds = estimated_seconds(prepared, decided.request.threads)
    data = {**plan_json(prepared, selected, seconds), **decided_json(decided)}
    if decided.first:
        data["hash"] = None  # what is measured is part of it
    if budgeted is not None:
        data["allocation"]["layers"] = explanation(budgeted)
        if budgeted.table is not None:
            data["allocation"]["table"] = budgeted.table.origin()
        if why:
            explain(budgeted, console)
        if figures is not None:
            write_figures(budgeted, figures, console)
    show_coverage(prepared, console, selected)
    show_forecast(prepared, console, seconds)
    if decided.quality is not None and decided.quality.above is not None:
        data["quality"]["next_seconds"] = _show_next(decided.quality, decided.request.threads, console)
    write_json(json_file, data)
    refuse_what_cannot_fit(prepared.forecast, out or Path.cwd())
