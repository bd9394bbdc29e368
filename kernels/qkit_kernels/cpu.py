"""Products with quantized weights on the CPU, through operators that torch has.

An operator is good at few rows of activations, where the time goes into reading the weight; at many rows a dense product
is, even with the weight dequantized first. So each operator has a number of rows, measured for this kind of core, beyond
which slices of the weight are dequantized (a slice stays in the cache) and multiplied in the arithmetic that the core is
fast at: bfloat16 where it has such products, else float32. The numbers are in tables/cpu.json, which
``python -m qkit_kernels.tune_cpu`` makes.

  int4pack    _weight_int4pack_mm_for_cpu: INT3 and INT4 in groups of 32 to 256, bf16 activations (float32 ones would take
              a scalar path, 28 times slower). INT3 is held in 4 bits: its codes are INT4 codes, and unpacking 3 bits takes
              longer than reading 4
  int8pack    _weight_int8pack_mm: INT5 to INT8 with a scale per row, bf16 activations
  int_mm      _int_mm: INT8 with a scale per row, INT8 activations: exact integer sums, at any number of rows; on cores
              that have INT8 products
  bag         quantized::embedding_bag (FBGEMM): any integers, float32 arithmetic. A bag is a weighted sum of quantized
              rows; here a row is one column of a tile of the weight, its factor the activation, and a bag is one group,
              whose sum is scaled afterwards. INT2 is held in 2 bits, INT3 and INT4 in 4, others in 8
  dequantize  slices at any number of rows: what remains (NVFP4, MXFP4, FP8, shapes that do not fit). FP4 is held in 4 bits:
              no operator knows its grid; as INT8 codes it would be faster at one row, and twice as large

The same product gives the same bits each time. Codes can be read back exactly from every layout (``codes``): nothing is held
twice.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files

import torch
from torch import Tensor

from qkit_kernels import cores
from qkit_kernels.weight import CodeFormat, Weight, float_scale

OPS = ("int_mm", "int4pack", "int8pack", "bag", "dequantize")  # the first supported one is used
SLICE = 1 << 20  # elements of the weight that are dequantized at a time
_BAGS = {2: "2bit", 4: "4bit", 8: "byte"}
_FLOATS = {
    "fp4": (9, 0x7000, 2.0**14),
    "fp8": (7, 0x4000, 2.0**8),
}  # to float16: shift, bits to clear, bias


@dataclass(frozen=True, kw_only=True)
class CpuWeight:
    """A weight laid out for one operator.

    op:     one of OPS
    weight: format, scales and zero points; without codes
    shape:  (out, in)
    data:   the codes: uint8 [out, bytes] (dequantize), int8 [out, in] (int8pack, int_mm), uint8 [tiles, in, bytes] (int4pack,
            bag). Lane i of a byte is bits [i b, (i + 1) b); the lanes of n bytes that follow each other are n codes each: first
            all of lane 0, and so on. Tiles hold the codes column by column, with 2^(b - 1) added
    bits:   b, of a code in ``data``
    scales: as the operator wants them; None where it takes those of ``weight``
    rows:   largest number of activation rows that the operator runs
    """

    op: str
    weight: Weight
    shape: tuple[int, int]
    data: Tensor
    bits: int
    scales: Tensor | None
    rows: int

    @property
    def tile(self) -> int:
        """Rows of the weight in a tile; 1: codes lie row by row."""
        if self.op not in ("int4pack", "bag"):
            return 1
        tail = 0 if self.op == "int4pack" else 8 if self.bits == 8 else 4
        return (self.data.shape[2] - tail) * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (self.data, self.scales, self.weight.scale, self.weight.zero, self.weight.global_scale)
        storages = [t.untyped_storage() for t in tensors if t is not None]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


# ---- what can run ----------------------------------------------------------------------------------------------


@functools.cache
def most_rows(kind: str) -> dict[str, int]:
    """{operator: largest number of rows that it runs} on a kind of core.

    A kind that was not measured has the entry 'other': few rows, for which reading the weight takes most of the time.
    """
    table = json.loads(files("qkit_kernels").joinpath("tables/cpu.json").read_text(encoding="utf-8"))
    row_limits: dict[str, int] = table.get(kind, table["other"])["rows"]
    return row_limits


def supported(op: str, fmt: CodeFormat, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether this core runs ``op`` on weights [out, in] of that format; dtype: of activations (int8: codes)."""
    out, columns = shape
    if fmt.group is not None and columns % fmt.group:
        return False
    if op == "dequantize":
        return dtype.is_floating_point
    plain = fmt.symmetric and fmt.group is None
    if op == "int_mm":
        fits = fmt.kind == "int" and plain and out % 8 == 0 and columns % 8 == 0
        return fits and dtype == torch.int8 and cores.multiplies_int8()
    if fmt.kind != "int" or most_rows(cores.kind()).get(op, 0) == 0:
        return False
    if op == "int8pack":
        return plain and dtype == torch.bfloat16 and fmt.bits > 4
    if op == "int4pack":
        tile = int4_tile()
        fits = tile is not None and out % tile == 0 and fmt.group in (32, 64, 128, 256)
        return fits and dtype == torch.bfloat16 and fmt.bits in (3, 4)
    return (
        op == "bag"
        and dtype.is_floating_point
        and out % 64 == 0
        and "fbgemm" in torch.backends.quantized.supported_engines
    )


@functools.cache
def int4_tile() -> int | None:
    """Rows of a tile in int4pack's layout (32 with AVX2, 64 with AVX-512); None on cores whose layout is another one."""
    codes = torch.arange(128 * 4, dtype=torch.int32).mul(7).view(128, 4) % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for tile in (32, 64):
        if torch.equal(_tiled(codes.to(torch.uint8), tile, 4).flatten(), packed.flatten()):
            return tile
    return None


def _tiled(unsigned: Tensor, tile: int, bits: int) -> Tensor:
    """Codes uint8 [out, in] in tiles, uint8 [out / tile, in, tile bits / 8]."""
    return _joined(unsigned.unflatten(0, (-1, 8 // bits, tile * bits // 8)), bits).transpose(1, 2).contiguous()


def _joined(lanes: Tensor, bits: int) -> Tensor:
    """Bytes [a, ..] that hold all lanes of codes uint8 [a, lane, ..], of which the low bits count; for 8 bits the codes."""
    if bits == 8:
        return lanes[:, 0]
    packed = lanes[:, 0] & ((1 << bits) - 1)
    for i in range(1, 8 // bits):
        packed |= lanes[:, i] << (i * bits) & (((1 << bits) - 1) << (i * bits))
    return packed


# ---- laying out ------------------------------------------------------------------------------------------------


def prepare(weight: Weight, dtype: torch.dtype) -> CpuWeight:
    """The weight in the layout of the operator that suits activations of ``dtype`` (int8: codes)."""
    op = next(o for o in OPS if supported(o, weight.format, weight.shape, dtype))
    return lay_out(op, weight, most_rows(cores.kind()).get(op, 0))


def lay_out(op: str, weight: Weight, rows: int) -> CpuWeight:
    """The weight in the layout of an operator that supports it. rows: up to which it runs."""
    fmt, shape = weight.format, weight.shape
    bare = replace(weight, codes=weight.codes.new_empty(0))
    if op in ("int8pack", "int_mm"):
        scales = weight.scale[:, 0].to(torch.bfloat16 if op == "int8pack" else torch.float32)
        return CpuWeight(op=op, weight=bare, shape=shape, data=weight.codes, bits=8, scales=scales, rows=rows)
    if op == "int4pack":
        scale = float_scale(weight)
        zero = torch.zeros_like(scale) if weight.zero is None else scale * -weight.zero.to(torch.float32)
        scales = torch.stack((scale.T, zero.T), dim=-1).to(torch.bfloat16).contiguous()  # [groups, out, 2]
        if weight.scale.dtype == torch.bfloat16:
            bare = replace(bare, scale=scales[..., 0].T)
        tile = int4_tile()
        assert tile is not None
        return CpuWeight(
            op=op,
            weight=bare,
            shape=shape,
            data=_tiled(_unsigned(weight.codes, 4), tile, 4),
            bits=4,
            scales=scales,
            rows=rows,
        )
    bits = next(b for b in (2, 4, 8) if fmt.bits <= b)
    if op == "bag":
        tile = next(t for t in (256, 128, 64) if shape[0] % t == 0)
        packed = _tiled(_unsigned(weight.codes, bits), tile, bits)
        ends = torch.tensor([1.0, -(2.0 ** (bits - 1))], dtype=torch.float32 if bits == 8 else torch.float16)
        tail = ends.view(torch.uint8).expand(*packed.shape[:2], -1)  # scale and bias of a row
        return CpuWeight(
            op=op, weight=bare, shape=shape, data=torch.cat((packed, tail), dim=2), bits=bits, scales=None, rows=rows
        )
    bits = 8 if shape[1] % (8 // bits) else bits
    data = _joined(weight.codes.view(torch.uint8).unflatten(1, (8 // bits, -1)), bits)
    return CpuWeight(op=op, weight=bare, shape=shape, data=data, bits=bits, scales=None, rows=rows)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


# ---- reading back ----------------------------------------------------------------------------------------------


def codes(p: CpuWeight) -> Tensor:
    """The codes of the weight before ``prepare``, [out, in] in their dtype."""
    out, columns = p.shape
    flat_codes = torch.empty(out * columns, dtype=torch.int8, device=p.data.device)
    for lane, target in _lanes(p, 0, out, flat_codes):
        target.copy_(lane)
    unpacked = flat_codes.view(p.shape) if p.tile == 1 else flat_codes.view(columns, out).T.contiguous()
    return (unpacked & 0xF if p.weight.format.kind == "fp4" else unpacked).view(p.weight.codes.dtype)


def rows_of(p: CpuWeight, index: Tensor) -> Tensor:
    """The codes of some rows of a weight of integers, int8 [n, in]; nothing else is read. index: int64 [n]"""
    columns, per = p.shape[1], 8 // p.bits
    if p.tile == 1:
        data = p.data[index].view(torch.uint8)[:, None]  # lane i holds the columns [i in / per, (i + 1) in / per)
        shift = torch.arange(per, device=data.device, dtype=torch.uint8)[:, None] * p.bits
        lanes = (data >> shift).reshape(len(index), columns)
    else:
        width = p.tile // per  # lane i holds the rows [i width, (i + 1) width) of a tile
        place = index % p.tile
        data = p.data[index // p.tile, :, place % width]
        lanes = (data >> ((place // width)[:, None] * p.bits).to(torch.uint8)) ^ (1 << (p.bits - 1))  # stored unsigned
    return (lanes << (8 - p.bits)).view(torch.int8) >> (8 - p.bits)


def _lanes(p: CpuWeight, start: int, stop: int, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(int8 codes, sign-extended, and where in ``buffer`` they go) of rows [first, last), lane by lane.

    buffer: [rows in]; it gets [rows, in], or [in, rows] where codes lie in tiles.
    """
    per, columns = 8 // p.bits, p.shape[1]
    if p.tile == 1:
        data = p.data[start:stop]
        targets = buffer.view(stop - start, per, -1).unbind(1)
    else:
        signs = sum(1 << (low + p.bits - 1) for low in range(0, 8, p.bits))
        data = p.data[start // p.tile : stop // p.tile, :, : p.tile // per] ^ signs
        targets = buffer.view(columns, -1, per, p.tile // per).transpose(0, 1).unbind(2)
    for i, target in enumerate(targets):
        shift = 8 - p.bits * (i + 1)
        lane = (data << shift if shift else data).view(torch.int8)
        yield lane >> (8 - p.bits) if p.bits < 8 else lane, target


def _half(lane: Tensor, kind: str) -> Tensor:
    """Values of int8 E2M1 or E4M3 codes, float16, by moving their bits; torch's own conversion is ten times slower."""
    shift, clear, factor = _FLOATS[kind]
    half = lane.to(torch.int16).bitwise_left_shift_(shift).bitwise_and_(~clear)
    return half.view(torch.float16).mul_(factor)


def _values(p: CpuWeight, start: int, stop: int, buffer: Tensor) -> Tensor:
    """Dequantized rows [first, last) as [in, rows], in the dtype of ``buffer`` and in its memory."""
    buffer = buffer[: (stop - start) * p.shape[1]]
    for lane, target in _lanes(p, start, stop, buffer):
        target.copy_(lane if p.weight.format.kind == "int" else _half(lane, p.weight.format.kind))
    zero = p.weight.zero
    scales_of_rows = replace(
        p.weight, scale=p.weight.scale[start:stop], zero=None if zero is None else zero[start:stop]
    )
    if scales_of_rows.format.scale == "e4m3":
        scales_of_rows = replace(scales_of_rows, scale=_half(scales_of_rows.scale.view(torch.int8), "fp8"))
    scale = float_scale(scales_of_rows)
    if p.tile == 1:
        values = buffer.view(stop - start, scale.shape[1], -1)
        if scales_of_rows.zero is not None:
            values -= scales_of_rows.zero.to(values.dtype)[..., None]
        values *= scale.to(values.dtype)[..., None]
        return values.flatten(1).T
    values = buffer.view(scale.shape[1], -1, stop - start)
    if scales_of_rows.zero is not None:
        values -= scales_of_rows.zero.T.to(values.dtype).contiguous()[:, None]
    values *= scale.T.to(values.dtype).contiguous()[:, None]
    return values.flatten(0, 1)


# ---- products --------------------------------------------------------------------------------------------------


def linear(x: Tensor, p: CpuWeight) -> Tensor:
    """x [rows, in] times the weight, [rows, out] in x's dtype; for int8 codes (int_mm) float32, without token scales."""
    if p.op == "int_mm":
        return _int_mm(x, p)
    if p.op == "dequantize" or not 0 < len(x) <= p.rows:
        return _dense(x, p)
    if p.op == "bag":
        return _bag(x, p).to(x.dtype)
    x_bf16 = x.to(torch.bfloat16).contiguous()  # the operators refuse a transposed one
    y: Tensor
    if p.op == "int8pack":
        y = torch.ops.aten._weight_int8pack_mm(x_bf16, p.data, p.scales)
    else:
        group = p.weight.format.group
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x_bf16, p.data.view(p.shape[0], -1), group, p.scales)
    return y.to(x.dtype)


def _int_mm(x: Tensor, p: CpuWeight) -> Tensor:
    rows = len(x)
    if rows <= 16:  # the operator wants more than 16 rows on some builds
        x = torch.nn.functional.pad(x, (0, 0, 0, 17 - rows))
    assert p.scales is not None
    y: Tensor = torch._int_mm(x, p.data.T)[:rows] * p.scales
    return y


def _bag(x: Tensor, p: CpuWeight) -> Tensor:
    """x times the weight, float32 [rows, out]. y = sum over groups of scale (sum of x code - zero sum of x)."""
    (out, columns), groups = p.shape, p.weight.scale.shape[1]
    group, tiles, rows = columns // groups, out // p.tile, len(x)
    by_group = x.to(torch.float32).view(rows, groups, group).transpose(0, 1)  # [groups, rows, group]
    expanded_shape = (tiles, groups, rows, group)
    index = (
        torch.arange(tiles * columns, dtype=torch.int32)
        .view(tiles, groups, 1, group)
        .expand(expanded_shape)
        .reshape(-1)
    )
    starts = torch.arange(0, tiles * columns * rows, group, dtype=torch.int32)
    op = getattr(torch.ops.quantized, f"embedding_bag_{_BAGS[p.bits]}_rowwise_offsets")
    sums = op(p.data.flatten(0, 1), index, starts, per_sample_weights=by_group.expand(expanded_shape).reshape(-1))
    lanes = 8 // p.bits
    # The operator's columns take the lanes of a byte in turn.
    sums = sums.view(tiles, groups, rows, -1, lanes).transpose(-1, -2)

    def beside(per_group: Tensor) -> Tensor:
        """[out, groups] in the order of the operator's results, [tiles, groups, 1, lane, n]."""
        return per_group.view(tiles, lanes, -1, groups).permute(0, 3, 1, 2).unsqueeze(2)

    if p.weight.zero is not None:
        sums = sums - beside(p.weight.zero.to(torch.float32)) * by_group.sum(-1)[..., None, None]
    y: Tensor = (sums * beside(float_scale(p.weight))).sum(1)  # [tiles, rows, lane, n]
    return y.transpose(0, 1).reshape(rows, out)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of dense products with activations x."""
    if x.device.type != "cpu":
        return x.dtype
    return torch.bfloat16 if x.dtype == torch.bfloat16 and cores.multiplies_bf16() else torch.float32


def _dense(x: Tensor, p: CpuWeight) -> Tensor:
    dtype, (out, columns) = product_dtype(x), p.shape
    step = max(1, SLICE * min(torch.get_num_threads(), 16) // (columns * p.tile)) * p.tile
    buffer = torch.empty(min(step, out) * columns, dtype=dtype, device=x.device)
    x_dense = x.to(dtype)
    y = torch.empty(len(x), out, dtype=dtype, device=x.device)
    for start in range(0, out, step):
        y_slice = y[:, start : start + step]
        torch.mm(x_dense, _values(p, start, start + y_slice.shape[1], buffer), out=y_slice)
    return y.to(x.dtype)
