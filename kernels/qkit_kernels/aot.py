"""Every kernel compiled ahead of time for the GPUs that matter, on a machine that may have none: what the compiler
made of it.

    python -m qkit_kernels.aot [--only TEXT]            compiles what has TEXT in its label, and says what is wrong with it
    python -m qkit_kernels.aot --write                  the same for all, and writes tables/compiled.json

A row: registers of a thread, bytes spilled, bytes of shared memory, loads of 16 bytes, stores and shuffles of the
loop (numbers that go from lane to lane), instructions of the loop to a weight, the tensor core's instruction. Wrong
are: a spill; more shared memory than the GPU has; words that are not loaded 16 bytes at a time; numbers that go from
lane to lane, which the layout is there to avoid. The exit status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qkit_kernels import kv
from qkit_kernels.layout import PAIRS, block_columns, lay_out
from qkit_kernels.matmul import Tile, constants, product_kernel
from qkit_kernels.matmul8 import product8_kernel, quantize_kernel
from qkit_kernels.sparse import sparse_kernel
from qkit_kernels.tiles import FORMATS, TILES, fitted
from qkit_kernels.weight import Weight

KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program can have
ARCHITECTURES = tuple(SHARED)
TABLE = Path(__file__).parent / "tables" / "compiled.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """registers: of a thread; spilled: bytes; shared: bytes; wide_loads: of 16 bytes, in the loop; exchanged: stores to
    shared memory in the loop; instructions: of the loop, of a warp's lane, to a weight of it (None: a kernel that
    reads no packed weight); core: the tensor core's instruction."""

    registers: int
    spilled: int
    shared: int
    wide_loads: int
    exchanged: int
    instructions: float | None
    core: str


def sample(name: str, dtype: torch.dtype) -> Any:
    """A small weight of a format, in the kernels' layout."""
    fmt = FORMATS[name]
    columns = 4 * block_columns(fmt.bits)
    groups = 1 if fmt.group is None else columns // fmt.group
    kind = {"int": torch.int8, "fp4": torch.uint8, "fp8": torch.float8_e4m3fn}[fmt.kind]
    stored = {"float": dtype, "e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}[fmt.scale]
    zero = None if fmt.symmetric else torch.zeros(32, groups, dtype=torch.int8)
    weight = Weight(fmt, torch.zeros(32, columns).to(kind), torch.ones(32, groups).to(stored), zero)
    return lay_out(weight, dtype)


def compile_product(name: str, dtype: torch.dtype, tile: Tile, architecture: int, gated: bool = False) -> Compiled:
    """The compiled product kernel of a format."""
    weight = sample(name, dtype)
    kind = KINDS[dtype]
    stored = "i32" if weight.format.scale != "float" else kind
    types = {
        "x_ptr": kind, "words_ptr": "i32", "scale_ptr": stored, "zero_ptr": "i8", "row_ptr": "fp32", "token_ptr": "fp32",
        "bias_ptr": kind, "residual_ptr": kind, "y_ptr": kind, "sums_ptr": "fp32", "count_ptr": "i32",
    }  # fmt: skip
    fixed = {
        **constants(weight), "GATED": gated, "TOKEN": False, "BIAS": False, "RESIDUAL": False, "EVEN": True, "ASM": True,
        "PLAIN": False, "ROWS": tile.rows, "TOKENS": tile.tokens, "STAGES": tile.stages, "SPLIT": tile.split,
    }  # fmt: skip
    binary = _compile(product_kernel, types, ("M", "N", "K", "STRIDE", "BLOCKS", "SPAN"), fixed, tile, architecture)
    return _read(binary, tile, weight)


def compile_product8(name: str, dtype: torch.dtype, tile: Tile, architecture: int) -> Compiled:
    """The compiled product kernel with INT8 activations."""
    weight = sample(name, dtype)
    kind = KINDS[dtype]
    types = {
        "code_ptr": "i8", "token_ptr": "fp32", "sum_ptr": "i32", "words_ptr": "i32", "scale_ptr": kind, "zero_ptr": "i8",
        "row_ptr": "fp32", "bias_ptr": kind, "y_ptr": kind, "sums_ptr": "fp32", "count_ptr": "i32",
    }  # fmt: skip
    fixed = {
        "BITS": weight.format.bits, "PAIRS": PAIRS[weight.format.bits], "SCALED": weight.scale is not None,
        "ZERO": weight.zero is not None, "BIAS": False, "PLAIN": False, "ROWS": tile.rows, "TOKENS": tile.tokens,
        "STAGES": tile.stages, "SPLIT": tile.split,
    }  # fmt: skip
    binary = _compile(product8_kernel, types, ("M", "N", "BLOCKS", "SPAN"), fixed, tile, architecture)
    return _read(binary, tile, weight)


def _compile(
    kernel: Any, types: dict[str, str], sizes: tuple[str, ...], fixed: dict[str, Any], tile: Tile, architecture: int
) -> Any:
    """A kernel for a GPU. types: of what the pointers point to."""
    signature = {**{n: f"*{t}" for n, t in types.items()}, **dict.fromkeys(sizes, "i32")}
    names = kernel.arg_names
    # Pointers come 16-byte aligned; of the sizes N, K and the stride are multiples of 16 in the models that matter.
    aligned = [n for n in signature if n.endswith("_ptr") or n in ("N", "K", "STRIDE")]
    source = ASTSource(
        kernel,
        {**signature, **dict.fromkeys(fixed, "constexpr")},
        {(names.index(n),): v for n, v in fixed.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compile_quantize(bits: int | None, dtype: torch.dtype, architecture: int) -> Compiled:
    """The kernel that rounds activations, for product8 with a weight of so many bits, or (None) for view8."""
    kind = KINDS[dtype]
    types = {"x_ptr": kind, "code_ptr": "i8" if bits else kind, "scale_ptr": "fp32", "sum_ptr": "i32"}
    fixed = {"PAIRS": PAIRS[bits or 4], "CHUNK": 4096, "ORDERED": bits is not None, "PLAIN": False}
    tile = Tile(1, 1, 8, 1, 1)
    return _read(_compile(quantize_kernel, types, ("K", "STRIDE", "BLOCKS"), fixed, tile, architecture))


def compile_sparse(dtype: torch.dtype, architecture: int) -> Compiled:
    """The compiled kernel of sparse parts."""
    kind = KINDS[dtype]
    types = {"x_ptr": kind, "start_ptr": "i32", "column_ptr": "i32", "value_ptr": kind, "y_ptr": "fp32"}
    fixed = {"ROWS": 16, "STEP": 16, "PLAIN": False}
    return _read(_compile(sparse_kernel, types, ("N", "STRIDE"), fixed, Tile(1, 1, 2, 1, 1), architecture))


def compile_decode(keys: int, values: int, dim: int, dtype: torch.dtype, architecture: int) -> Compiled:
    """The compiled attention kernel of a packed cache, for bits of keys and values and a head_dim."""
    kind = KINDS[dtype]
    packed = {"w_ptr": "i16", "l_ptr": "fp16", "s_ptr": "fp16"}
    types = {"q_ptr": kind, **{f"{side}{n}": t for side in "kv" for n, t in packed.items()}}
    types |= {n: "fp32" for n in ("mask_ptr", "m_ptr", "l_ptr", "acc_ptr")}
    fixed = {
        "KBITS": keys, "VBITS": values, "D": dim, "DV": dim, "G": 4, "MASK": False, "PLAIN": False, "ROWS": 16, "N": kv.TILE,
        "STAGES": kv.STAGES,
    }  # fmt: skip
    tile = Tile(1, 1, kv.WARPS, kv.STAGES, 1)
    return _read(_compile(kv.decode_kernel, types, ("T", "HEADS", "SPAN"), fixed, tile, architecture))


def _read(binary: Any, tile: Tile | None = None, weight: Any = None) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        usage = _tool("cuobjdump", "-res-usage", f.name)
        text = _tool("cuobjdump", "-sass", f.name)
    loop = _loop(text)
    instructions = None
    if tile is not None:
        weights = max(tile.rows, 16 * tile.warps) * block_columns(weight.format.bits)
        instructions = round(len(loop) * 32 * tile.warps / weights, 2)
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        spilled=int(re.search(r"LOCAL:(\d+)", usage)[1]),  # type: ignore[index]
        shared=binary.metadata.shared,
        wide_loads=sum(o.startswith("LDG") and ".128" in o for o in loop),
        exchanged=sum(o.startswith(("STS", "SHFL", "STSM")) for o in loop),
        core=next(iter(re.findall(r"\b([A-Z]*MMA)\b", text)), "none"),
        instructions=instructions,
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _loop(sass: str) -> list[str]:
    """Opcodes of the longest loop."""
    instructions = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", sass, re.M)
    longest: list[str] = []
    for address, opcode, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode.startswith("BRA") and target and int(target[1], 16) < int(address, 16):
            body = [o for a, o, _ in instructions if int(target[1], 16) <= int(a, 16) <= int(address, 16)]
            longest = max(longest, body, key=len)
    return longest


def kernels() -> Iterator[tuple[str, Callable[[], Compiled]]]:
    """(kernel, format, dtype, tile and architecture in words; what compiles it)."""
    for dtype in (torch.float16, torch.bfloat16):
        for architecture in ARCHITECTURES:
            target = f"{str(dtype)[6:]} sm_{architecture}"
            for bits in (4, 8, None):
                label = f"quantize {f'for {bits} bits' if bits else 'for view8'} {target}"
                yield label, partial(compile_quantize, bits, dtype, architecture)
            for bits in kv.BITS:
                for dim in (64, 128):
                    yield (
                        f"kv int{bits} head {dim} {target}",
                        partial(compile_decode, bits, bits, dim, dtype, architecture),
                    )
            yield f"sparse {target}", partial(compile_sparse, dtype, architecture)
    for name, fmt in FORMATS.items():
        integers = fmt.kind == "int" and fmt.bits in (4, 8) and name != "int4 g32"
        for kernel in (compile_product, compile_product8)[: 1 + integers]:
            for dtype in (torch.float16, torch.bfloat16):
                for tile in (fitted(t, fmt.bits) for t in TILES):
                    for architecture in ARCHITECTURES:
                        label = f"{kernel.__name__[8:]} {name} {str(dtype)[6:]} {_words(tile)} sm_{architecture}"
                        yield label, partial(kernel, name, dtype, tile, architecture)


def _words(tile: Tile) -> str:
    return f"{tile.rows}x{tile.tokens}, {tile.warps} warps, {tile.stages} stages, split {tile.split}"


def wrong(row: Compiled, architecture: int) -> str:
    """The faults of a row; empty where there are none."""
    faults = [f"{row.spilled} bytes spilled"] if row.spilled else []
    if row.shared > SHARED[architecture]:
        faults.append(f"{row.shared} bytes of shared memory, and sm_{architecture} has {SHARED[architecture]}")
    if row.instructions is None:
        return ", ".join(faults)
    faults += [] if row.wide_loads else ["words are not loaded 16 bytes at a time"]
    # One store or two of bookkeeping are the loop's own; the tensor cores of sm_100 read from shared memory.
    crossing = row.exchanged > 2 and not row.core.startswith("UTC")
    return ", ".join(faults + ([f"{row.exchanged} exchanges between lanes"] if crossing else []))


def main() -> int:
    """Run the command; 1 if a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="Write the table.")
    parser.add_argument("--only", default="", help="Rows whose label has this.")
    args = parser.parse_args()
    rows, fault_count = {}, 0
    for label, compiled in kernels():
        if args.only not in label:
            continue
        row = compiled()
        rows[label] = asdict(row)
        fault = wrong(row, int(label.rpartition("sm_")[2]))
        fault_count += bool(fault)
        print(label, "|", " ".join(f"{k} {v}" for k, v in rows[label].items()), "|", fault or "ok", flush=True)
    if args.write:
        lines = ",\n".join(f"  {json.dumps(label)}: {json.dumps(row)}" for label, row in rows.items())
        text = f'{{\n "triton": {json.dumps(triton.__version__)},\n "rows": {{\n{lines}\n }}\n}}\n'
        TABLE.write_text(text, encoding="utf-8")
    return int(fault_count > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
