"""Measures which tile is the fastest, and writes it down for this GPU.

    python -m qkit_kernels.autotune --shapes 4096x4096,14336x4096 [--formats "int4 g128,int3 g128"] [--tokens 8,16,32,64]

Timed is what decoding sees: a CUDA graph in which copies of the weight follow each other, at least three times the L2
cache in all, so that each comes from memory. The table (tables/GPU.json) keeps what was there for other shapes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import product as every
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from qkit_kernels.gpu import to
from qkit_kernels.layout import KernelWeight, lay_out
from qkit_kernels.matmul import Tile, product
from qkit_kernels.tiles import FORMATS, TABLES, key
from qkit_kernels.weight import CodeFormat, Weight

CALLS = 200  # in a graph


def random_weight(
    fmt: CodeFormat, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int
) -> Weight:
    """Random codes and scales, of which no product is NaN."""
    g = torch.Generator(device).manual_seed(seed)
    groups = 1 if fmt.group is None else shape[1] // fmt.group
    codes = torch.randint(0, 1 << fmt.bits, shape, generator=g, device=device, dtype=torch.int16).to(torch.uint8)
    zero = None
    if fmt.kind == "int":
        signed = codes.to(torch.int16) - (1 << (fmt.bits - 1))
        codes = signed.to(torch.int8)
        zero = (
            None
            if fmt.symmetric
            else torch.randint(-2, 2, (shape[0], groups), generator=g, device=device, dtype=torch.int8)
        )
    elif fmt.kind == "fp8":
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)
    scale = torch.rand(shape[0], groups, generator=g, device=device).mul(0.01).add(0.005)
    if fmt.scale == "e4m3":
        return Weight(fmt, codes, (scale * 1000).to(torch.float8_e4m3fn), zero, torch.full((1,), 1000.0, device=device))
    if fmt.scale == "e8m0":
        return Weight(fmt, codes, torch.full_like(scale, 120).to(torch.uint8), zero)
    return Weight(fmt, codes, scale.to(dtype), zero)


def copies(weight: KernelWeight, device: torch.device, times: int = 3) -> list[KernelWeight]:
    """Enough copies of the weight to fill the L2 cache ``times`` times."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [weight, *(to_new(weight) for _ in range(-(-times * cache // weight.nbytes)))]


def to_new(weight: KernelWeight) -> KernelWeight:
    """A copy of the weight in new memory."""
    host = to(weight, torch.device("cpu"))
    return to(host, weight.words.device)


def seconds(calls: list[Callable[[], Any]], rounds: int = 7) -> list[float]:
    """Sorted seconds per call of ``rounds`` replays of a graph that has at least CALLS of the calls in turn."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    turns = -(-CALLS // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / (turns * len(calls)))
    return sorted(times)


def candidates(weight: KernelWeight, tokens: int) -> Iterator[Tile]:
    """Yield the tiles to measure."""
    blocks, processors = (
        weight.words.shape[1],
        torch.cuda.get_device_properties(weight.words.device).multi_processor_count,
    )
    for (rows, warps), stages, split in every(
        ((16, 1), (32, 2), (64, 4), (64, 2), (128, 4), (128, 8)), (3, 5), (1, 2, 4, 8, 16)
    ):
        programs = -(-weight.shape[0] // rows) * split
        crowded = rows * tokens > 64 * 64 * (warps // 4 + 1) or split > blocks // 2
        if not crowded and processors // 2 <= programs <= 16 * processors:
            yield Tile(rows, tokens, warps, stages, split)


def tune(name: str, shape: tuple[int, int], tokens: int, device: torch.device) -> tuple[Tile, float]:
    """The fastest tile, and its time in seconds."""
    dtype = torch.bfloat16
    weight = lay_out(random_weight(FORMATS[name], shape, dtype, device, 0), dtype)
    every_copy = copies(weight, device)
    x = torch.randn(tokens if tokens > 8 else 1, shape[1], device=device, dtype=dtype)
    best: tuple[Tile, float] | None = None
    for tile in candidates(weight, tokens):
        calls = [_call(x, one, tile) for one in every_copy]
        try:
            took = seconds(calls, 3)[1]
        except OutOfResources:  # more shared memory than there is
            continue
        best = (tile, took) if best is None or took < best[1] else best
    assert best is not None
    return best


def _call(x: Tensor, weight: KernelWeight, tile: Tile) -> Callable[[], Tensor]:
    return lambda: product(x, weight, tile)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", required=True, help="out x in, for instance 4096x4096,14336x4096.")
    parser.add_argument("--formats", default="int4 g128", help=f"Of {', '.join(FORMATS)}.")
    parser.add_argument("--tokens", default="8,16,32,64", help="Tokens of a tile.")
    args = parser.parse_args()
    device = torch.device("cuda")
    file = TABLES / f"{torch.cuda.get_device_name(device).replace(' ', '-').lower()}.json"
    table = json.loads(file.read_text()) if file.exists() else {"tiles": {}}
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")]
    for name, (rows, columns), tokens in every(args.formats.split(","), shapes, map(int, args.tokens.split(","))):
        tile, took = tune(name, (rows, columns), tokens, device)
        print(name, rows, columns, tokens, tile, f"{took * 1e6:.2f} us", flush=True)
        table["tiles"][key(FORMATS[name].bits, (rows, columns), tokens)] = [
            tile.rows, tile.tokens, tile.warps, tile.stages, tile.split,
        ]  # fmt: skip
        file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
