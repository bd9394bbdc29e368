"""qkit convert: the same weights in the layout of another tool."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import OutFile, OutFolder, Reporter
from qkit.commands.verb import Verb


@click.command("convert", cls=Verb)
@click.argument("model")
@click.option(
    "--export",
    type=click.Choice(["gptq", "awq", "modelopt", "mlx", "compressed-tensors"]),
    required=True,
    help="Layout of the result.",
)
@click.option("--out", type=OutFolder(), required=True, help="Output folder.")
@click.option("--overwrite", is_flag=True, help="Replace a result of qkit in the output folder.")
@click.option("--json", "json_file", type=OutFile(), help="JSON file for the report.")
def convert_command(model: str, export: str, out: Path, overwrite: bool, json_file: Path | None) -> None:
    """Write the quantized model MODEL in another layout, with the same codes and scales.

    MODEL is a result of qkit, or a folder in compressed-tensors, GPTQ, AWQ, AutoRound, FP8, ModelOpt or MLX
    layout. Nothing is
    quantized anew: what the new layout has no place for is refused, with the name of the layer. The result is read back, and
    every weight is compared with that of MODEL.

    \b
    Example:
      qkit convert out/tiny-llama-w4a16 --export gptq --out out/tiny-llama-gptq
    """
    from qkit.commands.measured import json_bytes
    from qkit.files.safefile import write_atomic
    from qkit.workflows.convert import convert

    reporter = Reporter(Console(stderr=True), "the same command")
    with reporter.running():
        done = convert(model, export, out, reporter, overwrite)
    if json_file is not None:
        write_atomic(json_file, json_bytes(done.to_json()))
    console = Console()
    checks = sum(done.report.checks.values())
    console.print(
        Text(
            f"{out}: {done.linears} linears, {done.source} to {export}, {done.report.bytes:,} bytes, {checks:,} checks"
        ),
        soft_wrap=True,
    )
    same = f"{done.equal} of {done.linears} weights are those of the source, bit for bit in float32"
    if done.equal < done.linears:
        same += (
            f"; the others have the same codes and group scales under the reciprocal of their global scale, and differ by at "
            f"most {done.difference:.1e} of a weight"
        )
    console.print(Text(same), soft_wrap=True)
