"""qkit convert: the same weights in the layout of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import OutFile, OutFolder, Reporter
from qkit.commands.verb import Verb
from qkit.errors import UsageError
from qkit.files.locate import find_model
from qkit.files.output import check_output_dir


class _Layout(click.Choice[str]):
    """The layouts, and the reason why GGUF is none of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The layout of a name. Raises UsageError for GGUF."""
        if str(value).lower() == "gguf":
            raise UsageError(
                "--export gguf: convert keeps the codes and scales of a model, and the blocks of GGUF hold others: make the "
                "file from the original model with 'qkit quantize --model ORIGINAL --scheme q4_k --out OUT' ('qkit list "
                "schemes' has all types)"
            )
        return super().convert(value, param, ctx)


@click.command("convert", cls=Verb)
@click.argument("model")
@click.option(
    "--export",
    type=_Layout(["gptq", "awq", "modelopt", "mlx", "compressed-tensors"]),
    required=True,
    help="Layout of the result.",
)
@click.option("--out", type=OutFolder(), required=True, help="Output folder.")
@click.option("--overwrite", is_flag=True, help="Replace a result of qkit in the output folder.")
@click.option("--json", "json_file", type=OutFile(), help="JSON file for the report.")
def convert_command(model: str, export: str, out: Path, overwrite: bool, json_file: Path | None) -> None:
    """Write the quantized model MODEL in another layout, with the same codes and scales.

    MODEL is a result of qkit, or a folder in compressed-tensors, GPTQ, AWQ, AutoRound, FP8, ModelOpt or MLX layout. Nothing is
    quantized anew: what the new layout has no place for is refused, with the name of the layer. The result is read back, and
    every weight is compared with that of MODEL.

    \b
    Example:
      qkit convert out/tiny-llama-w4a16 --export gptq --out out/tiny-llama-gptq
    """
    check_output_dir(out, find_model(model).resolve(), overwrite)  # before torch is imported, which takes seconds

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
