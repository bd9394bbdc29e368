"""qkit push: a result on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import OutFile, announce, megabytes, write_json
from qkit.commands.grid import print_wide, printable, wide_table
from qkit.commands.verb import Verb


@click.command("push", cls=Verb)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--dry-run", is_flag=True, help="Only show what would be uploaded. Needs no network and no token.")
@click.option("--private", is_flag=True, help="Make a new repository private. A public one that is there is refused.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, made if it is not there (default: main).")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option("--json", "json_file", type=OutFile(), help="JSON file for what was uploaded.")
def push_command(
    out: Path,
    repository: str,
    dry_run: bool,
    private: bool,
    revision: str | None,
    message: str | None,
    json_file: Path | None,
) -> None:
    """Upload the result in OUT to the repository REPO (OWNER/NAME) of the Hugging Face Hub.

    The folder is verified first: the exit code is 4 if it is not sound, and nothing is uploaded then. The files that qkit.json
    lists go up, and qkit.json and README.md. Then the files in the repository are compared with those that were sent.
    The token is that of 'hf auth login' or HF_TOKEN.

    \b
    Example:
      qkit push out/w4a16 me/model-w4a16 --dry-run
      qkit push out/w4a16 me/model-w4a16 --private
    """
    console = Console()
    announce(console, f"verifying {out}")

    from qkit.workflows.push import plan_push, push, strangers

    planned = plan_push(out, repository, revision, private, message)
    table = wide_table("file", "size", title=f"{planned.repository}, branch {planned.revision}")
    for file in planned.files:
        table.add_row(Text(printable(file.name)), megabytes(file.bytes))
    print_wide(console, table)
    for name in planned.left_out:
        console.print(Text(f"left out: {printable(name)}"))
    for note in planned.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    total = f"{len(planned.files)} files, {megabytes(planned.bytes)}"
    if dry_run:
        console.print(Text(f"{total} would be uploaded"))
        write_json(json_file, {**planned.to_json(), "commit": None})
        return
    commit = push(out, planned)
    console.print(Text(f"{total} uploaded and compared: {commit}"), soft_wrap=True)
    for name in strangers(planned):
        console.print(
            Text(
                f"note: {planned.repository} also has {printable(name)}, which is not of this result: remove it there"
            ),
            soft_wrap=True,
        )
    write_json(json_file, {**planned.to_json(), "commit": commit})
