"""python -m qkit_kernels.tune_cpu [--threads N] [--table FILE]: measures up to how many rows each operator beats slices.

Of every operator and every number of rows, its time and that of dequantized slices, one after the other, several times over;
the lower fifth of each counts. An operator gets the last number of rows up to which it was never slower, on the shapes and
formats below. All times are printed; the entry of this kind of core is written into the table. On one thread processor time
is taken, which other processes disturb little; on several it is the clock, so nothing else should run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from qkit_kernels import cores, cpu
from qkit_kernels.weight import CodeFormat, Weight

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SHAPES = ((4096, 4096), (1024, 4096))
CASES = {  # by operator: formats, dtype of activations
    "int4pack": ([CodeFormat("int", 4, 128)], torch.bfloat16),
    "int8pack": ([CodeFormat("int", 8, None)], torch.bfloat16),
    "bag": ([CodeFormat("int", bits, 128) for bits in (2, 4, 8)], torch.float32),
}


def random_weight(fmt: CodeFormat, shape: tuple[int, int], seed: int = 0) -> Weight:
    """A random weight: codes over the whole range of an integer format, scales around 0.01, zero points if it has them."""
    out, columns = shape
    generator = torch.Generator().manual_seed(seed)
    groups = columns // (fmt.group or columns)
    low, high = -(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1)
    codes = torch.randint(low, high, shape, dtype=torch.int8, generator=generator)
    scale = (torch.rand(out, groups, generator=generator) * 0.01 + 0.005).to(torch.bfloat16)
    zero = None if fmt.symmetric else torch.randint(low, high, (out, groups), dtype=torch.int8, generator=generator)
    return Weight(fmt, codes, scale, zero)


def seconds(runs: tuple[Callable[[], Tensor], ...], repeats: int) -> list[float]:
    """The lower fifth of the times of each run, in seconds; runs alternate."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times_by_run: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, times in zip(runs, times_by_run, strict=True):
            start = clock()
            run()
            times.append(clock() - start)
    return [sorted(times[1:])[repeats // 5] for times in times_by_run]


def last_row(op: str, repeats: int) -> int:
    """The largest number of rows up to which ``op`` is never slower than slices; 0 where it is slower from the start."""
    limit = ROWS[-1]
    formats, dtype = CASES[op]
    for fmt, shape in itertools.product(formats, SHAPES):
        weight = cpu.lay_out(op, random_weight(fmt, shape), rows=limit)
        slices = replace(weight, rows=0)
        for rows in (r for r in ROWS if r <= limit):
            x = torch.randn(rows, shape[1]).to(dtype)
            with torch.inference_mode():
                times = seconds((partial(cpu.linear, x, weight), partial(cpu.linear, x, slices)), repeats)
            described = f"{op}, int{fmt.bits}, {shape[0]}x{shape[1]}, {rows} rows"
            print(f"{described}: {times[0] * 1e3:.2f} ms, slices {times[1] * 1e3:.2f} ms", flush=True)
            if times[0] > times[1]:
                limit = max((r for r in ROWS if r < rows), default=0)
                break
    return limit


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qkit_kernels.tune_cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--table", type=Path, default=Path(str(files("qkit_kernels"))) / "tables" / "cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ops = [op for op in CASES if op != "int4pack" or cpu.int4_tile() is not None]
    entry = {
        "rows": {op: last_row(op, args.repeats) for op in ops},
        "measured": {"processor": cores.name(), "torch": torch.__version__, "threads": args.threads},
    }
    table = json.loads(args.table.read_text(encoding="utf-8")) if args.table.is_file() else {}
    table[cores.kind()] = entry
    args.table.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{args.table}: {cores.kind()}: {entry['rows']}")


if __name__ == "__main__":
    main()
