"""The options of a KV cache, and what is printed of it: shared by quantize and plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import megabytes

if TYPE_CHECKING:
    from qkit.workflows.kv_cache import CachePlan


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which cache, and how large."""
    options = [
        click.option(
            "--kv",
            metavar="POLICY",
            help="KV cache to run with, a kind and its bits: pm-kvq:4-2, kivi2, int8, rotate4, hierarchical8, xquant4, "
            "xquant-cl2 or fp8 ('qkit list caches').",
        ),
        click.option(
            "--kv-memory", help="Budget of the KV cache of a sequence of --max-length tokens, for instance 2GB."
        ),
        click.option(
            "--max-length", type=click.IntRange(1), help="Tokens that the KV cache is made for (default: the model's)."
        ),
        click.option(
            "--kv-scale-keys", is_flag=True, help="Make the channels of keys alike, by scales in the weights."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def show_cache(found: CachePlan, console: Console) -> None:
    """Which cache, what it takes, and the final widths of the layers."""
    p = found.policy
    share = f"{megabytes(found.bytes)}, {found.bytes / found.plain_bytes:.3f} of 16 bits"
    console.print(Text(f"KV cache: {p.name}, {share}" + (f", at {p.length} tokens of a sequence" if p.length else "")))
    if p.finals and len(set(p.finals)) > 1:
        console.print(Text("final bits by layer: " + " ".join(map(str, p.finals))))
    if found.exponents is not None:
        spans = [max(map(max, layer)) - min(map(min, layer)) for layer in found.exponents]
        console.print(Text("scales of keys, octaves between channels, by layer: " + " ".join(map(str, spans))))
