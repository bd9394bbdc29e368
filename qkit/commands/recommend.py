"""qkit recommend: the scheme, the KV cache and the commands for a machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import OutFile, announce, megabytes, write_json
from qkit.commands.grid import print_wide, printable, wide_table
from qkit.commands.verb import Verb
from qkit.errors import Unsupported
from qkit.planning.devices import DEVICES
from qkit.planning.measured_losses import measured_losses

if TYPE_CHECKING:
    from qkit.workflows.recommendation import Candidate, Recommendation


@click.command("recommend", cls=Verb)
@click.option("--model", required=True, help="Model: a folder, or the name of a repository. config.json is enough.")
@click.option(
    "--memory",
    help="Memory of the machine, with --tp of each GPU, for instance 8GB (default: that of --device; for a CPU, that of this "
    "machine).",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Longest text in tokens (default: 8192, or the longest of the model if that is less).",
)
@click.option(
    "--engine",
    type=click.Choice(["vllm", "llama.cpp", "transformers"]),
    help="Engine that runs the result (default: vllm, with --device cpu llama.cpp).",
)
@click.option("--device", help=f"Machine by name: {', '.join(DEVICES)} (default: any GPU).")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="GPUs that share the model, in vLLM.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="Folder of 'qkit profile' of this model: losses are its own then, and a mix of formats is tried.",
)
@click.option("--json", "json_file", type=OutFile(), help="JSON file for all that is printed.")
def recommend_command(
    model: str,
    memory: str | None,
    context: int | None,
    engine: str | None,
    device: str | None,
    tp: int,
    profile: Path | None,
    json_file: Path | None,
) -> None:
    """Recommend a scheme and a KV cache for a language model on a machine, and print the commands.

    Bytes of the weights are exact. Whether an engine loads a scheme, and with which kernel, comes from qkit's table of that
    engine. The expected loss is that of the profile, or what the scheme cost a model that was measured. The smallest file with
    a loss below 0.01 nats a token is recommended; where none fits, the one of least loss. The exit code is 3 where nothing
    fits.

    \b
    Examples:
      qkit recommend --model MODEL --memory 8GB --context 8192 --engine vllm
      qkit recommend --model MODEL --device rtx4090 --context 32768
      qkit recommend --model MODEL --device h100 --tp 4
      qkit recommend --model MODEL --memory 6GB --engine llama.cpp
    """
    from qkit.workflows.machines import machine_of

    machine_of(memory, engine, device, tp)  # what is wrong with it is told before libraries are loaded
    from qkit.workflows.recommend import recommend

    console = Console()
    announce(console, f"reading {model}")
    recommendation = recommend(model, context, memory, engine, device, profile, gpus=tp)
    write_json(json_file, recommendation.to_json())
    show(recommendation, console)
    if recommendation.chosen is None:
        raise Unsupported(
            f"{recommendation.engine} with {megabytes(recommendation.usable)} and {recommendation.context} tokens: no scheme "
            f"fits: {recommendation.why}: {recommendation.remedy}"
        )


def show(found: Recommendation, console: Console) -> None:
    """The table, what is recommended, and the commands."""

    def say(text: str) -> None:
        console.print(Text(printable(text)), soft_wrap=True)

    device = f" on {found.device}" if found.device else ""
    where = f"{device} with {megabytes(found.memory)}" + (f" in {found.gpus} GPUs" if found.gpus > 1 else "")
    table = wide_table(
        "scheme", "runs as", "weights", "KV cache", "total", "expected loss", "",
        title=f"{found.model} in {found.engine}{where}, {found.context:,} tokens",
    )  # fmt: skip
    for candidate in (found.plain, *found.candidates):
        if not candidate.refused:
            table.add_row(*_row(candidate, candidate == found.chosen))
    print_wide(console, table)
    for reason in dict.fromkeys(c.refused for c in found.candidates if c.refused):
        names = [c.scheme for c in found.candidates if c.refused == reason]
        say(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} left out: {reason}")
    say(f"expected loss: {found.evidence}")
    for note in found.notes:
        say(f"note: {note}")
    if found.chosen is None:
        return
    cache = f"KV cache {found.chosen.cache}"
    tokens = ""
    if found.tokens is not None:
        requests = f"{found.tokens // found.context:,} requests of {found.context:,} tokens at a time"
        tokens = f"; the memory holds {found.tokens:,} tokens of KV cache: {requests}"
    say(f"recommended: {found.chosen.scheme}, {cache}: {found.why}{tokens}")
    for command in found.commands:
        click.echo(f"  {command}")


def _row(c: Candidate, chosen: bool) -> tuple[str, ...]:
    verdict = "recommended" if chosen else "" if c.fits else "does not fit"
    cache = f"{c.cache}, {megabytes(c.cache_bytes)}"
    kernels = "\n".join(c.kernels)
    loss = f"{c.loss:.3g}" + (f" with {c.cache}" if c.cache in measured_losses().caches else "")
    return c.scheme, kernels, megabytes(c.weights), cache, megabytes(c.total), loss, verdict
