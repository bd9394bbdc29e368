"""The options and the printed summary of a KV cache: shared by quantize and plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qkit.allocation.limits import parse_bytes
from qkit.commands.common import megabytes
from qkit.commands.verb import Group, in_group
from qkit.errors import UsageError
from qkit.kvcache.policy import CacheRequest, parse

if TYPE_CHECKING:
    from qkit.workflows.kv_cache import CachePlan

_NAMES = ("kv", "kv_memory", "max_length", "kv_scale_keys")


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which cache, and how large."""
    cache = in_group(Group.KV_CACHE)
    options = [
        cache(
            "--kv",
            metavar="POLICY",
            help="KV cache policy, a kind and its bits: kivi2, int8, pm-kvq:4-2, rotate4, hierarchical8, xquant4, "
            "xquant-cl2 or fp8 ('qkit list caches').",
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


def cache_request(given: dict[str, Any]) -> CacheRequest | None:
    """The cache of parsed options, which are taken out of ``given``; None: a plain one."""
    asked = {name: given.pop(name) for name in _NAMES}
    if asked["kv"] is None:
        lost = next((n for n in _NAMES if asked[n]), None)
        if lost is not None:
            raise UsageError(f"--{lost.replace('_', '-')} needs --kv: add it, or leave this option out")
        return None
    parse(asked["kv"])
    memory = None if asked["kv_memory"] is None else parse_bytes(asked["kv_memory"], "--kv-memory")
    return CacheRequest(asked["kv"], memory, asked["max_length"], asked["kv_scale_keys"])


def show_cache(found: CachePlan, console: Console) -> None:
    """The cache, its size, and the final widths of the layers."""
    p = found.policy
    share = f"{megabytes(found.bytes)}, {found.bytes / found.plain_bytes:.3f} of 16 bits"
    console.print(Text(f"KV cache: {p.name}, {share}" + (f", at {p.length} tokens of a sequence" if p.length else "")))
    if p.finals and len(set(p.finals)) > 1:
        console.print(Text("final bits by layer: " + " ".join(map(str, p.finals))))
    if found.exponents is not None:
        spans = [max(map(max, layer)) - min(map(min, layer)) for layer in found.exponents]
        console.print(Text("scales of keys, octaves between channels, by layer: " + " ".join(map(str, spans))))
