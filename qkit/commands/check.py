"""qkit check: is the packed model within its budget?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import OutFile, announce, print_wide, wide_table
from qkit.commands.grid import Grid, printable
from qkit.commands.measured import json_bytes, progress_bar, show
from qkit.commands.verb import OptionGroup, Verb, in_group
from qkit.errors import BudgetNotMet
from qkit.evaluation.budget import Check, advice, junit_xml, load_budget
from qkit.evaluation.request import DTYPES
from qkit.evaluation.sources import text_name
from qkit.files.locate import find_model
from qkit.files.safefile import write_atomic
from qkit.workflows.check import baseline_of, check_model, check_request, mark, require_sound

_MOST_USED, _TEXTS, _DEVICE = in_group(OptionGroup.MOST_USED), in_group(OptionGroup.TEXTS), in_group(OptionGroup.DEVICE)


@click.command("check", cls=Verb)
@click.argument("out")
@_MOST_USED("--budget", "budget_file", required=True, type=click.Path(path_type=Path), help="YAML file of limits.")
@_MOST_USED(
    "--baseline",
    help="Original model (default: the one in the job folder beside OUT, or a reference model).",
)
@_MOST_USED(
    "--text",
    "texts",
    multiple=True,
    help="Text to measure, repeatable: FILE, NAME=FILE or dataset:NAME[:config][:split][:column].",
)
@_MOST_USED("--junit", "junit_file", type=OutFile(), help="XML file for a JUnit report.")
@_MOST_USED("--json", "json_file", type=OutFile(), help="JSON file for the checks and figures.")
@_TEXTS("--task-dir", type=click.Path(path_type=Path), help="Folder of additional lm-eval task files.")
@_TEXTS("--allow-task-code", is_flag=True, help="Allow the task files of --task-dir to run code.")
@_DEVICE(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(list(DTYPES)),
    help="Number format of arithmetic.",
)
@_DEVICE("--device", default="cpu", show_default=True, help="Device: cpu, cuda, cuda:1, ...")
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
    """Measure the model in the folder OUT and compare it with a budget.

    The exit code is 4 if a limit is not met. A folder that qkit wrote is verified first. If a limit is not met, the folder is
    marked as rejected (qkit-rejected.json). A check that passes removes the mark.

    \b
    Example:
      qkit check out/w4a16 --budget budget.yaml --baseline tiny-llama
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
            f"{out}: {len(report.failed)} of {len(checks)} limits of {budget_file} are not met: "
            f"{printable(', '.join(report.failed))}; {printable(advice(checks, measured))}"
        )


def checks_table(checks: Sequence[Check]) -> Grid:
    table = wide_table("budget line", "limit", "measured", "", title="budget")
    for check in checks:
        table.add_row(*map(Text, (printable(check.name), check.limit, check.shown, "ok" if check.ok else "FAILED")))
    return table
