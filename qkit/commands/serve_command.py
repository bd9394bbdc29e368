"""qkit serve-command: the command line that serves a result."""

from __future__ import annotations

from pathlib import Path

import click

from qkit.commands.grid import printable
from qkit.commands.verb import Verb


@click.command("serve-command", cls=Verb)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="GPUs that share the model.")
@click.option("--context", type=click.IntRange(1), help="Longest text in tokens (default: the longest of the model).")
def serve_command_command(out: Path, tp: int, context: int | None) -> None:
    """Print the command line that serves the model in OUT: of vLLM, or of llama.cpp for a GGUF file.

    Length and format of the KV cache come from the files. Limits of the engine are printed to stderr.

    \b
    Example:
      qkit serve-command out/w4a16 --tp 2 --context 8192
    """
    from qkit.workflows.serving import serve_command

    made = serve_command(out, tp, context)
    click.echo(made.command)
    for note in made.notes:
        click.echo(f"note: {printable(note)}", err=True)
