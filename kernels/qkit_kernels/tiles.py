"""Which tile a product is run with: the table of this GPU where there is one, else a rule.

tables/GPU.json, made by ``qkit_kernels.autotune``: {"bits rows columns tokens": [rows, tokens, warps, stages,
split]}, tokens being the bucket. A shape that is not in it gets the tile of the nearest one of the same bits and
bucket (by bytes).

The rule, for a GPU without a table: the more tokens, the more rows share what is read of x; and columns are split
until every multiprocessor has four programs or a program is down to four blocks. It is reasoned, not measured.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from math import ceil, log
from pathlib import Path

import torch

from qkit_kernels.layout import KernelWeight
from qkit_kernels.matmul import Tile
from qkit_kernels.weight import CodeFormat

TABLES = Path(__file__).parent / "tables"
BUCKETS = (8, 16, 32, 64)  # tokens of a tile
WIDEST = 64  # more rows of x than this take several tiles of tokens
PROGRAMS = 4  # for each multiprocessor
LEAST_BLOCKS = 4  # of a program
# Formats and tiles that are compiled ahead of time (aot.py), and tuned.
FORMATS = {
    "int4 g128": CodeFormat("int", 4, 128),
    "int4 g32": CodeFormat("int", 4, 32),
    "int4 g128 asym": CodeFormat("int", 4, 128, symmetric=False),
    "int4 channel": CodeFormat("int", 4, None),
    "int3 g128": CodeFormat("int", 3, 128),
    "int3 g128 asym": CodeFormat("int", 3, 128, symmetric=False),
    "int2 g128": CodeFormat("int", 2, 128),
    "int2 g64 asym": CodeFormat("int", 2, 64, symmetric=False),
    "int8 channel": CodeFormat("int", 8, None),
    "int8 g128": CodeFormat("int", 8, 128),
    "nvfp4": CodeFormat("fp4", 4, 16, scale="e4m3"),
    "mxfp4": CodeFormat("fp4", 4, 32, scale="e8m0"),
    "fp8 channel": CodeFormat("fp8", 8, None),
    "mxfp8": CodeFormat("fp8", 8, 32, scale="e8m0"),
}
TILES = (
    Tile(32, 8, 2, 4, 1),
    Tile(32, 8, 2, 4, 4),
    Tile(64, 16, 2, 4, 1),
    Tile(64, 32, 4, 4, 1),
    Tile(64, 64, 4, 3, 1),
)


def fitted(tile: Tile, bits: int) -> Tile:
    """A tile with so many stages that it runs on every GPU: a block of three-bit codes has 512 columns, and as many of x
    lie in shared memory for every stage, of which sm_89 has 99 KiB."""
    max_stages = {32: 3, 64: 2}.get(tile.tokens, tile.stages) if bits == 3 else tile.stages
    return replace(tile, stages=min(tile.stages, max_stages))


def bucket(m: int) -> int:
    """Number of tokens in a tile for m rows of x."""
    return next((b for b in BUCKETS if m <= b), WIDEST)


def choose(weight: KernelWeight, m: int, device: torch.device) -> Tile:
    """The tile for m rows of x, from this GPU's table or the rule."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        name, processors = "", 1  # the interpreter
    tuned = _nearest(name, weight, bucket(m))
    return tuned if tuned is not None else rule(weight, m, processors)


def rule(weight: KernelWeight, m: int, processors: int) -> Tile:
    """The tile for m rows of x where there is no table."""
    tokens = bucket(m)
    rows, warps = {8: (32, 2), 16: (64, 2)}.get(tokens, (64, 4))
    blocks = weight.words.shape[1]
    wanted_split = ceil(PROGRAMS * processors * rows / weight.shape[0])
    split = max(1, min(wanted_split, blocks // LEAST_BLOCKS)) if m <= tokens else 1
    return fitted(Tile(rows, tokens, warps, 3 if tokens == 64 else 4, split), weight.format.bits)


def key(bits: int, shape: tuple[int, int], tokens: int) -> str:
    """The key of a tile in a table."""
    return f"{bits} {shape[0]} {shape[1]} {tokens}"


@cache
def _table(name: str) -> dict[str, list[int]]:
    file = TABLES / f"{name.replace(' ', '-').lower()}.json"
    tiles: dict[str, list[int]] = json.loads(file.read_text())["tiles"] if name and file.exists() else {}
    return tiles


def _nearest(name: str, weight: KernelWeight, tokens: int) -> Tile | None:
    entries = [(k.split(), v) for k, v in _table(name).items()]
    candidates = [
        (
            abs(log(int(n) * int(c)) - log(weight.shape[0] * weight.shape[1]))
            + abs(log(int(n)) - log(weight.shape[0])),
            v,
        )
        for (b, n, c, t), v in entries
        if int(b) == weight.format.bits and int(t) == tokens
    ]
    return Tile(*min(candidates, key=lambda e: e[0])[1]) if candidates else None
