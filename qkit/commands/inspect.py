"""qkit inspect: the content of a folder or a file."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import OutFile, print_wide, wide_table, write_json
from qkit.commands.verb import Verb
from qkit.errors import BadCheckpoint
from qkit.files.inspect import Inspection, inspect
from qkit.system.words import megabytes


@click.command("inspect", cls=Verb)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=OutFile(), help="JSON file for the printed results.")
def inspect_command(path: Path, json_file: Path | None) -> None:
    """Show the content of PATH: a model folder, a safetensors file or a GGUF file.

    The command shows formats, sizes, bits per weight and the tool that made the file. It reads headers only and runs no code
    of the model. The exit code is 3 if something is damaged; everything that can be read is printed.

    \b
    Example:
      qkit inspect out/tiny-llama-w4a16 --json inspect.json
    """
    found = inspect(path)
    write_json(json_file, found.to_json())
    show(found, Console())
    if found.damaged:
        more = f" (and {len(found.damaged) - 1} more)" if len(found.damaged) > 1 else ""
        raise BadCheckpoint(f"{path}: damaged: {found.damaged[0]}{more}")


def show(found: Inspection, console: Console) -> None:
    "Prints all findings. Names from files were made printable when they were read."

    def say(text: str) -> None:
        console.print(Text("".join(c if c.isprintable() else "?" for c in text)), soft_wrap=True)

    model = f", {found.model_type}" if found.model_type else ""
    model += f" ({found.architecture})" if found.architecture else ""
    say(f"{found.path}: {found.kind}{model}")
    for line in found.quantization or (["not quantized"] if found.tensors else []):
        say(f"format: {line}")
    if found.made_by:
        say(f"made by: {found.made_by}")
    if found.rejected:
        say(f"REJECTED: {found.rejected}")
    if found.weight_files:
        bits = "" if found.bits is None else f", {found.bits:.2f} bits a weight"
        weights = "" if found.weights is None else f", {found.weights / 1e6:,.2f} million weights{bits}"
        say(f"weights: {megabytes(found.bytes)} in {found.weight_files} files, {found.tensors:,} tensors{weights}")
    if found.by_dtype:
        table = wide_table("dtype", "tensors", "bytes")
        for dtype, (count, size) in sorted(found.by_dtype.items(), key=lambda item: -item[1][1]):
            table.add_row(Text(dtype), f"{count:,}", megabytes(size))
        print_wide(console, table)
    if found.side_files:
        say("other files: " + ", ".join(f"{name} ({size:,})" for name, size in found.side_files.items()))
    for line in found.notes:
        say(f"note: {line}")
    for line in found.damaged:
        say(f"damaged: {line}")
