"""Tables that the code itself defines: schemes, methods, formats, families, cache policies, sizes of known models."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from markdown_table import Row, markdown

from qkit.commands import list as listing
from qkit.planning.sizes import linear_bytes
from qkit.tensor.formats import GGUF_FORMATS, SCHEMES, Format, Scheme, fit_gguf, layout
from qkit.tensor.gguf_blocks import block_bytes
from qkit.verification.engines import engine_fits


def schemes() -> str:
    """All schemes, with the class that vLLM loads each one as."""
    return markdown(merge([scheme_row(s) for s in SCHEMES.values()], ("scheme", "weights")))


def gguf() -> str:
    """All types of GGUF, with their sizes, and what a width that 256 does not divide gets."""
    rows: list[Row] = []
    for name, fmt in sorted(GGUF_FORMATS.items(), key=lambda item: (-block_bytes(item[1], (256,)), item[0])):
        narrow = fit_gguf(fmt, 32)
        rows.append(
            {
                "scheme": name,
                "bits per weight": f"{8 * block_bytes(fmt, (256,)) / 256:.4g}",
                "columns of a block": str(fmt.columns),
                "scale per": f"group of {fmt.group}",
                "minimum": "no" if fmt.symmetric else "yes",
                "other widths get": "-" if narrow is None or narrow == fmt else narrow.name,
            }
        )
    return markdown(rows)


def methods() -> str:
    """All solvers, transforms and searches, with their options."""
    return markdown(listing.methods())


def quality() -> str:
    """What each level of --quality chooses."""
    return markdown(listing.quality())


def formats() -> str:
    """All number formats."""
    return markdown(merge(listing.formats(), ("format", "bits")))


def families() -> str:
    """All declared model families."""
    return markdown(listing.families())


def caches() -> str:
    """All KV cache policies."""
    return markdown(listing.caches())


def scheme_row(scheme: Scheme) -> Row:
    row = next(row for row in listing.schemes() if row["scheme"] == scheme.name)
    return {**row, "vLLM loads it as": vllm(scheme.weights, scheme.activations)}


def vllm(weights: Format, activations: Format | None) -> str:
    fits = engine_fits(weights, activations, layout(weights, activations))
    return next(fit.loads_as for fit in fits if fit.engine == "vLLM") or "-"


def merge(rows: list[Row], joined: tuple[str, ...]) -> list[Row]:
    """One row for all that agree in every column but ``joined``, whose values are listed."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(v) for k, v in row.items() if k not in joined), []).append(row)
    return [
        {k: spans([str(r[k]) for r in same]) if k in joined else v for k, v in same[0].items()}
        for same in groups.values()
    ]


def spans(names: list[str]) -> str:
    """['int2', 'int3', 'int4', 'fp8'] -> 'int2 to int4, fp8': three or more names that count up become a span."""
    runs: list[list[str]] = []
    for name in dict.fromkeys(names):
        if runs and following(runs[-1][-1]) == name:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def following(name: str) -> str:
    """The name with its first number one higher."""
    return re.sub(r"\d+", lambda number: str(int(number[0]) + 1), name, count=1)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The published shape of a dense model of the Llama kind; ``tied``: the output head is the embedding matrix."""

    name: str
    width: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    tied: bool

    def linears(self) -> list[tuple[int, int]]:
        """Shapes [out, in] of the linears of a block."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        attention = [(queries, self.width), (keys, self.width), (keys, self.width), (self.width, queries)]
        return [*attention, (self.mlp, self.width), (self.mlp, self.width), (self.width, self.mlp)]

    def weights(self, scheme: str | None) -> int:
        """Bytes of all weights; the linears of the blocks in ``scheme``, or in 16 bits like all the rest."""
        embeddings = 2 * self.vocab * self.width * (1 if self.tied else 2)
        if scheme is None:
            return embeddings + self.layers * sum(2 * rows * columns for rows, columns in self.linears())
        chosen = SCHEMES[scheme]
        sizes = [linear_bytes(chosen.weights, chosen.activations, s, torch.bfloat16) for s in self.linears()]
        return embeddings + self.layers * sum(sizes)

    def cache(self, tokens: int) -> int:
        """Bytes of keys and values in 16 bits."""
        return 4 * tokens * self.layers * self.kv_heads * self.head


SHAPES = (
    Shape(name="Llama 3.2 1B", width=2048, layers=16, mlp=8192, heads=32, kv_heads=8, head=64, vocab=128256, tied=True),
    Shape(
        name="Llama 3.2 3B", width=3072, layers=28, mlp=8192, heads=24, kv_heads=8, head=128, vocab=128256, tied=True
    ),
    Shape(
        name="Llama 3.1 8B", width=4096, layers=32, mlp=14336, heads=32, kv_heads=8, head=128, vocab=128256, tied=False
    ),
    Shape(name="Qwen3 8B", width=4096, layers=36, mlp=12288, heads=32, kv_heads=8, head=128, vocab=151936, tied=False),
    Shape(name="Qwen3 14B", width=5120, layers=40, mlp=17408, heads=40, kv_heads=8, head=128, vocab=151936, tied=False),
)
TOKENS, MEMORY = 8192, 8_000_000_000


def fits() -> str:
    """GB of weights and of a KV cache in 16 bits; bold where both together are below 8 GB."""
    rows = []
    for shape in SHAPES:
        row: Row = {"model": shape.name, f"KV cache, {TOKENS:,} tokens": f"{shape.cache(TOKENS) / 1e9:.2f}"}
        for scheme in (None, "W8A16", "W4A16", "W3A16", "W2A16"):
            size = shape.weights(scheme)
            cell = f"{size / 1e9:.2f}"
            row["16 bits" if scheme is None else f"`{scheme.lower()}`"] = (
                f"**{cell}**" if size + shape.cache(TOKENS) < MEMORY else cell
            )
        rows.append(row)
    return markdown(rows)


TABLES = {
    "schemes": schemes,
    "gguf": gguf,
    "methods": methods,
    "quality-levels": quality,
    "formats": formats,
    "families": families,
    "caches": caches,
    "fits": fits,
}
