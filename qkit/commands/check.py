"""qkit check: is the packed model within its budget?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from qkit import __version__
from qkit.commands.common import OutFile, announce, print_wide, wide_table
from qkit.commands.grid import Grid
from qkit.commands.measured import json_bytes, printable, progress_bar, refuse_unsound, show
from qkit.commands.verb import Verb
from qkit.errors import BudgetNotMet, IOFailure, UsageError
from qkit.evaluation.budget import Check, QualityBudget, check_budget, junit_xml, load_budget
from qkit.evaluation.request import DTYPES, EvalRequest, jsonable
from qkit.evaluation.sources import text_name
from qkit.files.embedded import embedded_text
from qkit.files.locate import find_model, recorded_source
from qkit.files.rejected import NAME, clear_mark, write_mark
from qkit.files.safefile import write_atomic


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
    refuse_unsound(folder)
    original = recorded_source(folder) if baseline is None else find_model(baseline)
    if original is None and budget.needs_baseline:
        raise UsageError(
            f"budget {budget_file}: {', '.join(budget.needs_baseline)} cannot be judged without the original model; "
            "add --baseline PATH"
        )
    request = EvalRequest(
        texts=choose_texts(budget, texts, budget_file),
        window=budget.window,
        windows=budget.windows,
        tasks=budget.tasks,
        limit=budget.limit,
        task_dir=task_dir,
        allow_task_code=allow_task_code,
        dtype=dtype,
        device=device,
        pairs=budget.pairs if budget.measures_answers else None,
        questions=budget.questions,
        videos=budget.videos if budget.measures_samples else 0,
    )
    from qkit.evaluation.measure import measure

    with progress_bar(Console(stderr=True), max(1, len(request.texts))) as progress:
        measured = measure(folder, original, request, progress)
    checks = check_budget(budget, measured)
    if json_file is not None:
        write_atomic(json_file, json_bytes({"checks": [asdict(check) for check in checks], **measured}))
    if junit_file is not None:
        write_atomic(junit_file, junit_xml(checks, f"qkit check {measured['model']}").encode())
    show(measured, console)
    print_wide(console, checks_table(checks))
    failed = [check.name for check in checks if not check.ok]
    _mark(folder, budget_file, measured, checks)
    if failed:
        raise BudgetNotMet(
            f"{out}: {len(failed)} of {len(checks)} limits of {budget_file} not kept: {printable(', '.join(failed))}; "
            "quantize with more bits or another method, or change the budget"
        )


def _mark(folder: Path, budget_file: Path, measured: Mapping[str, Any], checks: Sequence[Check]) -> None:
    """Leaves the mark of a rejected result in a folder that qkit wrote, or takes it away."""
    failed = [asdict(check) for check in checks if not check.ok]
    try:
        if not failed:
            clear_mark(folder)
        elif write_mark(folder, __version__, budget_file.name, measured["baseline"], jsonable(failed)):
            click.echo(f"{folder / NAME}: marks the result as rejected", err=True)
    except (IOFailure, OSError) as e:  # the verdict counts, and is given all the same
        click.echo(f"qkit: the mark {folder / NAME} could not be changed: {e}", err=True)


def choose_texts(budget: QualityBudget, given: Sequence[str], budget_file: Path) -> list[str]:
    """What to measure: the texts given and those of the budget; the embedded one if there are none or a line names it.

    Nothing when no line is about text. Raises UsageError for a line about a text that is nowhere to be found.
    """
    if not budget.measures_text:
        return []
    texts, names = list(given), [text_name(spec) for spec in given]
    for name, path in budget.texts.items():
        if name not in names:
            texts.append(f"{name}={path}")
            names.append(name)
    if "evaluation" not in names and (not texts or "evaluation" in budget.named_texts):
        texts.append(str(embedded_text("evaluation")))
        names.append("evaluation")
    for name in budget.named_texts:
        if name not in names:
            raise UsageError(
                f"budget {budget_file}: no text is called '{name}'; add it under texts:, or --text {name}=FILE"
            )
    return texts


def checks_table(checks: Sequence[Check]) -> Grid:
    table = wide_table("budget line", "limit", "measured", "", title="budget")
    for check in checks:
        table.add_row(*map(Text, (printable(check.name), check.limit, check.shown, "ok" if check.ok else "FAILED")))
    return table
