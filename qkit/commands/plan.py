"""qkit plan: what quantize would do, and what it would cost; reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qkit.commands.common import make_request, megabytes, request_options, show_coverage, write_json
from qkit.forecast import refuse_what_cannot_fit
from qkit.pipeline import Prepared, coverage, prepare


def plan_json(found: Prepared) -> dict[str, Any]:
    """The machine's copy of a plan."""
    plan = found.plan.to_json()
    return {
        "hash": found.plan.hash,
        "coverage": coverage(found.plan),
        "forecast": found.forecast.to_json(),
        "linears": plan["linears"],
        "skipped": plan["skipped"],
        "calibration": plan["calibration"],
        "family": plan["family"],
        "seed": plan["seed"],
    }


def show_forecast(found: Prepared, console: Console) -> None:
    """Bytes, memory, and the phases that take the time."""
    f = found.forecast
    phases = ", ".join(f"{p['phase']} {p['share']:.0%}" for p in f.to_json()["time_dominating"][:3])
    console.print(
        f"forecast: output {megabytes(f.packed_bytes)}, job folder {megabytes(f.job_bytes)}, peak memory "
        f"{megabytes(f.peak_memory)}; time goes to: {phases}"
    )


@click.command("plan")
@request_options
@click.option("--out", type=click.Path(path_type=Path), help="Where the result would go (its disk is checked).")
def plan_command(json_file: Path | None, out: Path | None, **given: Any) -> None:
    """Say what quantize would do: coverage, exact bytes, peak memory, and where the time goes.

    Refuses what cannot fit.

    \b
    Example:
      qkit plan --model tiny-llama --scheme w4a16 --method gptq --json plan.json
    """
    console = Console()
    found = prepare(make_request(given))
    show_coverage(found, console)
    show_forecast(found, console)
    write_json(json_file, plan_json(found))
    refuse_what_cannot_fit(found.forecast, out or Path.cwd())
