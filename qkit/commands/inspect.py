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
    inspection = inspect(path)
    write_json(json_file, inspection.to_json())
    show(inspection, Console())
    if inspection.damaged:
        more = f" (and {len(inspection.damaged) - 1} more)" if len(inspection.damaged) > 1 else ""
        raise BadCheckpoint(f"{path}: damaged: {inspection.damaged[0]}{more}")


def show(inspection: Inspection, console: Console) -> None:
    "Prints all findings. Names from files were made printable when they were read."

    def say(text: str) -> None:
        console.print(Text("".join(c if c.isprintable() else "?" for c in text)), soft_wrap=True)

    model = f", {inspection.model_type}" if inspection.model_type else ""
    model += f" ({inspection.architecture})" if inspection.architecture else ""
    say(f"{inspection.path}: {inspection.kind}{model}")
    for line in inspection.quantization or (["not quantized"] if inspection.tensors else []):
        say(f"format: {line}")
    if inspection.made_by:
        say(f"made by: {inspection.made_by}")
    if inspection.rejected:
        say(f"REJECTED: {inspection.rejected}")
    if inspection.weight_files:
        bits = "" if inspection.bits is None else f", {inspection.bits:.2f} bits a weight"
        weights = "" if inspection.weights is None else f", {inspection.weights / 1e6:,.2f} million weights{bits}"
        say(
            f"weights: {megabytes(inspection.bytes)} in {inspection.weight_files} files, "
            f"{inspection.tensors:,} tensors{weights}"
        )
    if inspection.by_dtype:
        table = wide_table("dtype", "tensors", "bytes")
        for dtype, (count, size) in sorted(inspection.by_dtype.items(), key=lambda item: -item[1][1]):
            table.add_row(Text(dtype), f"{count:,}", megabytes(size))
        print_wide(console, table)
    if inspection.side_files:
        say("other files: " + ", ".join(f"{name} ({size:,})" for name, size in inspection.side_files.items()))
    for line in inspection.notes:
        say(f"note: {line}")
    for line in inspection.damaged:
        say(f"damaged: {line}")
