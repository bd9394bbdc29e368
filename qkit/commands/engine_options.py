"""The options that say which engine a result is for, and what it runs on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from qkit.commands.verb import OptionGroup, in_group
from qkit.errors import UsageError

_Command = TypeVar("_Command", bound=Callable[..., Any])
GPU_HELP = "Kinds of GPU: sm75, sm80, sm86, sm89, sm90, sm100, sm120 or cpu, several with commas"
TP_HELP = "Number of GPUs that share the model (tensor parallel)"


def engine_options(command: _Command) -> _Command:
    """--engine, --gpu and --tp of quantize and plan."""
    engine = in_group(OptionGroup.ENGINE)
    options = [
        engine(
            "--engine",
            type=click.Choice(["vllm", "transformers", "llama.cpp", "any"]),
            help="Engine that has to load the result. What it does not load is refused, and a budget does not choose it. "
            "With any, layers that engines load as one may differ.",
        ),
        engine("--gpu", help=f"{GPU_HELP}, on which the engine has to load the result (default: any GPU)."),
        engine("--tp", type=int, help=f"{TP_HELP}; group sizes are chosen so that each GPU gets whole groups."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def require_vllm(engine: str | None, python: Path | None) -> None:
    """Raises UsageError for an interpreter whose engine has no selector of kernels to ask."""
    if python is not None and engine != "vllm":
        raise UsageError(f"--python {python}: only vLLM's choice of kernels can be asked for: add --engine vllm")
