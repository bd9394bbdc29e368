"""The options and the printed summary of a KV cache: shared by quantize and plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import megabytes
from qkit.commands.verb import OptionGroup, in_group

if TYPE_CHECKING:
    from qkit.workflows.kv_cache import CachePlan


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which cache, and how large."""
    cache = in_group(OptionGroup.KV_CACHE)
    options = [
        cache(
            "--kv",
            metavar="POLICY",
            help="KV cache policy, a kind and its bits: kivi2, int8, pm-kvq:4-2, rotate4, hierarchical8, xquant4, "
            "xquant-cl2, fp8, fp8_head or nvfp4 ('qkit list caches').",
        ),
        cache("--kv-memory", help="Memory budget of the KV cache of one sequence, for instance 2GB."),
        cache(
            "--max-length",
            type=click.IntRange(1),
            help="Sequence length in tokens that the KV cache is planned for (default: the model's limit).",
        ),
        cache(
            "--kv-scale-keys", is_flag=True, help="Equalize the channels of keys, with scales folded into the weights."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def show_cache(cache: CachePlan, console: Console) -> None:
    """The cache, its size, and the final widths of the layers."""
    p = cache.policy
    share = f"{megabytes(cache.bytes)}, {cache.bytes / cache.plain_bytes:.3f} of 16 bits"
    console.print(Text(f"KV cache: {p.name}, {share}" + (f", at {p.length} tokens of a sequence" if p.length else "")))
    if p.finals and len(set(p.finals)) > 1:
        console.print(Text("final bits by layer: " + " ".join(map(str, p.finals))))
    if cache.exponents is not None:
        spans = [max(map(max, layer)) - min(map(min, layer)) for layer in cache.exponents]
        console.print(Text("scales of keys, octaves between channels, by layer: " + " ".join(map(str, spans))))
