"""qkit report: the page of finished results, without new runs."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from qkit.commands.common import OutFile, announce, write_json
from qkit.commands.grid import printable
from qkit.commands.verb import Verb
from qkit.errors import BadInput
from qkit.files.safefile import write_atomic
from qkit.system.extras import require


@click.command("report", cls=Verb)
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
@click.option("--out", type=OutFile(), default="report.html", show_default=True, help="HTML file for the page.")
@click.option(
    "--eval",
    "eval_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="JSON file of 'qkit eval' with the figures of OUT, repeatable.",
)
@click.option(
    "--profile", type=click.Path(path_type=Path), help="Folder of 'qkit profile', for the sensitivity figure."
)
@click.option("--json", "json_file", type=OutFile(), help="JSON file for what the page shows.")
def report_command(
    outs: tuple[str, ...], out: Path, eval_files: tuple[Path, ...], profile: Path | None, json_file: Path | None
) -> None:
    """Write the page of the finished results in the folders OUT: how they were made, and what was measured.

    Nothing is run or measured: the page shows what the folders record. With --eval it also shows quality: tables, quality
    against size, and answers side by side. The page is one file that loads nothing from the network.

    \b
    Example:
      qkit report out/w4a16 --out report.html
      qkit report out/w4a16 out/w8a16 --eval eval.json --out report.html
    """
    require("qkit report", "report", "jinja2", "matplotlib")
    from qkit.commands.measured import notes, page_tables
    from qkit.files.locate import find_model
    from qkit.report.result import result_facts
    from qkit.report.result_page import result_page
    from qkit.sensitivity.profile import Profile
    from qkit.workflows.report import measured_of

    console = Console()
    announce(console, f"reading {' '.join(outs)}")
    facts = [result_facts(find_model(name)) for name in outs]
    measured = measured_of(facts, eval_files)
    try:
        known_profile = None if profile is None else Profile.load(profile)
        page = result_page(facts, measured, page_tables(measured), notes(measured), known_profile)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        if not eval_files:
            raise
        names = " and ".join(map(str, eval_files))
        raise BadInput(
            f"{names}: not the figures that this version of qkit writes ({error!r}): measure again with 'qkit eval'"
        ) from error
    write_json(json_file, {"results": facts, "measured": measured})
    write_atomic(out, page.encode())
    console.print(
        f"{printable(str(out))}: the page of {len(facts)} result{'s' if len(facts) > 1 else ''}", soft_wrap=True
    )
