"""qkit check: is the packed model within its budget?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import OutFile, announce, print_wide, wide_table
from qkit.commands.grid import Grid
from qkit.commands.measured import json_bytes, printable, progress_bar, show
from qkit.commands.verb import Verb
from qkit.errors import BudgetNotMet
from qkit.evaluation.budget import Check, junit_xml, load_budget
from qkit.evaluation.request import DTYPES
from qkit.evaluation.sources import text_name
from qkit.files.locate import find_model
from qkit.files.safefile import write_atomic
from qkit.workflows.check import baseline_of, check_model, check_request, mark, require_sound


@click.command("check", cls=Verb)
@click.argument("out")
@click.option("--budget", "budget_file", required=True, type=click.Path(path_type=Path), help="A YAML file of limits.")
@click.option(
    "--baseline", help="The original model (default: where the job folder beside OUT says, or a reference model)."
)
@click.option("--text", "texts", multiple=True, help="FILE, NAME=FILE or dataset:NAME[:config][:split][:column].")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(list(DTYPES)), help="Of arithmetic.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--task-dir", type=click.Path(path_type=Path), help="A folder of further lm-eval task files.")
@click.option("--allow-task-code", is_flag=True, help="Let the task files of --task-dir run code.")
@click.option("--junit", "junit_file", type=OutFile(), help="Write a JUnit report to this file.")
@click.option("--json", "json_file", type=OutFile(), help="Write checks and figures to this file.")
def check_command(
    out: str,
    budget_file: Path,
    baseline: str | None,
    texts: tuple[str, ...],
    dtype: str,
    device: str,
    task_dir: Path | None,
    allow_task_code: bool,
    junit_file: Path | None,
    json_file: Path | None,
) -> None:
    """Measure the model in the folder OUT and hold it against a budget. Exit code 4 if a limit is not kept.

    A folder that qkit wrote is verified first. If a limit is not kept, the folder is marked as rejected (qkit-rejected.json);
    a check that passes takes the mark away.

    \b
    Example:
      qkit check out/tiny-llama-w4a16 --budget budget.yaml --baseline tiny-llama --junit check.xml
    where budget.yaml has lines such as
      perplexity: +2%
      kl.mean: 0.02
      same_top1: ">=0.95"
      size: 0.3x
    """
    budget = load_budget(budget_file)
    for spec in texts:
        text_name(spec)
    console = Console()
    announce(console, f"verifying {out}")
    folder = find_model(out)
    require_sound(folder)
    original = baseline_of(folder, baseline, budget, budget_file)
    request = check_request(budget, budget_file, texts, dtype, device, task_dir, allow_task_code)
    with progress_bar(Console(stderr=True), max(1, len(request.texts))) as progress:
        report = check_model(folder, original, budget, request, progress)
    measured, checks = report.measured, report.checks
    if json_file is not None:
        write_atomic(json_file, json_bytes({"checks": [asdict(check) for check in checks], **measured}))
    if junit_file is not None:
        write_atomic(junit_file, junit_xml(checks, f"qkit check {measured['model']}").encode())
    show(measured, console)
    print_wide(console, checks_table(checks))
    mark(folder, budget_file, measured, checks, lambda sentence: click.echo(sentence, err=True))
    if report.failed:
        raise BudgetNotMet(
            f"{out}: {len(report.failed)} of {len(checks)} limits of {budget_file} not kept: "
            f"{printable(', '.join(report.failed))}; quantize with more bits or another method, or change the budget"
        )


def checks_table(checks: Sequence[Check]) -> Grid:
    table = wide_table("budget line", "limit", "measured", "", title="budget")
    for check in checks:
        table.add_row(*map(Text, (printable(check.name), check.limit, check.shown, "ok" if check.ok else "FAILED")))
    return table
