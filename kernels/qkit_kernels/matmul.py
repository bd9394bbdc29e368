"""y = x W^T on a GPU, for a weight in the layout of layout.py: one kernel for every format and for 1 to 64 rows of x.

The weight is the left operand of the tensor core (16 rows of it at a time) and x^T the right one, whose width goes
down to 8: so one row of x costs no more than eight. Codes go from a lane's 16-byte load through its registers into
the tensor core. Products are summed in float32. A scale that a whole block of columns shares multiplies the block's
sum; finer ones multiply the numbers before.

Where rows / tile does not fill the GPU, the columns are split between programs; the last one to finish adds their
sums up in their order. So the same input gives the same bits, and nothing has to be zeroed before a launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkit_kernels.decode import (
    bits_fp4,
    bits_fp8,
    narrow,
    pair_int,
    pair_int8,
    scaled,
    scales_of_bytes,
    times,
    unscaled,
    wide,
)
from qkit_kernels.layout import PAIRS, KernelWeight


@dataclass(frozen=True)
class Tile:
    """The tile of a program: rows of the weight; tokens (rows of x); warps; stages: blocks in flight; split: programs that
    share a row's columns."""

    rows: int
    tokens: int
    warps: int
    stages: int
    split: int


@triton.jit
def _integers(
    a, b, c, offset, J: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, LITERAL: tl.constexpr,
    ASM: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Pair J of every word: (low, high), shape of a."""
    if BITS == 3:
        if J == 15:
            t = ((a >> 15) & 0x00010001) | ((b >> 14) & 0x00020002) | ((c >> 13) & 0x00040004)
            low, high = pair_int(t, offset, 0, 0x00070007, LITERAL, ASM, PLAIN)
        elif J >= 10:
            low, high = pair_int(c, offset, 3 * (J - 10), 0x00070007, LITERAL, ASM, PLAIN)
        elif J >= 5:
            low, high = pair_int(b, offset, 3 * (J - 5), 0x00070007, LITERAL, ASM, PLAIN)
        else:
            low, high = pair_int(a, offset, 3 * J, 0x00070007, LITERAL, ASM, PLAIN)
    elif BITS == 8:
        if DTYPE == tl.bfloat16:
            low, high = pair_int8(a, offset, J, DTYPE, PLAIN)
        else:
            low, high = pair_int(a, offset, 8 * J, 0x00FF00FF, LITERAL, ASM, PLAIN)
    else:
        low, high = pair_int(a, offset, BITS * J, ((1 << BITS) - 1) * 0x00010001, LITERAL, ASM, PLAIN)
    return low, high


@triton.jit
def _block(
    acc, xs, live, k, room, ws, ss, zs,
    KIND: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr, SCALE: tl.constexpr, SCALES: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, LITERAL: tl.constexpr, FACTOR: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr, EVEN: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """acc [rows, tokens] plus the product of a block.

    xs: pointers [32, tokens] to the eight columns k of pair 0 of units 0 to 3; live: tokens that there are; room:
    columns from the block's first to the end; ws: to words [rows, w, u]; ss, zs: to scales and zero points, [rows]
    where a block has one, else [rows, w, u].
    """
    ROWS: tl.constexpr = acc.shape[0]
    PARTS: tl.constexpr = SCALES // 4 if SCALES > 1 else 1
    WIDE: tl.constexpr = tl.float32 if KIND == "int" and BITS == 8 and DTYPE == tl.bfloat16 else DTYPE
    a = tl.load(ws)
    b = tl.load(ws + 128) if BITS == 3 else a
    c = tl.load(ws + 256) if BITS == 3 else a
    block_sum = tl.zeros_like(acc)
    offset = tl.full([1, 1, 1], OFFSET, WIDE)
    factor = tl.full([1, 1, 1], FACTOR, DTYPE)
    if SCALES == 1 and ZERO:
        offset = narrow(OFFSET - tl.load(zs).to(tl.float32), WIDE, PLAIN)[:, None, None]
    for p in tl.static_range(PARTS):
        if SCALES > 1:
            if SCALE == "float":
                s = tl.load(ss + 4 * p)
            else:
                s = scales_of_bytes(tl.load(ss + p), SCALE, FACTOR, DTYPE, PLAIN)
            if ZERO:
                offset = narrow(OFFSET - tl.load(zs + 4 * p).to(tl.float32), WIDE, PLAIN)
        for h in tl.static_range(PAIRS // PARTS):
            if KIND == "int":
                low, high = _integers(a, b, c, offset, p * (PAIRS // PARTS) + h, BITS, DTYPE, LITERAL, ASM, PLAIN)
                if SCALES > 1:
                    low, high = times(low, s, PLAIN), times(high, s, PLAIN)
            else:
                if BITS == 4:
                    bits = bits_fp4(a, p * (PAIRS // PARTS) + h, DTYPE)
                else:
                    bits = bits_fp8(a, p * (PAIRS // PARTS) + h, DTYPE)
                low, high = scaled(bits, s if SCALES > 1 else factor, ASM, PLAIN)
            # columns in the order (unit, word, low or high)
            numbers = tl.join(low, high).permute(0, 2, 1, 3).reshape(ROWS, 32)
            column_offset = 8 * (p * (PAIRS // PARTS) + h)
            mask = live if EVEN else live & (k + column_offset < room)[:, None]
            x = tl.load(xs + column_offset, mask=mask, other=0.0)
            if PLAIN:
                block_sum = tl.dot(wide(numbers, PLAIN), wide(x, PLAIN), block_sum)
            else:
                block_sum = tl.dot(numbers, x, block_sum)
    if SCALES == 1:
        return acc + block_sum * wide(tl.load(ss), PLAIN)[:, None]
    return acc + block_sum


@triton.jit
def product_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, row_ptr, token_ptr, bias_ptr, residual_ptr, y_ptr, sums_ptr, count_ptr,
    M, N, K, STRIDE, BLOCKS, SPAN,
    KIND: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr, SCALE: tl.constexpr, SCALES: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, LITERAL: tl.constexpr, FACTOR: tl.constexpr, GATED: tl.constexpr,
    TOKEN: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    PLAIN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T times row factors (and token factors [M]), plus bias [N], plus residual [M, N].

    GATED: W has 2 N rows (each half filled up to a multiple of 16), and y = silu(first half) * second half.
    BLOCKS: of a row; SPAN: of them to a program; STRIDE: between rows of x.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    COLUMNS: tl.constexpr = 32 * PAIRS
    tile, turn = tl.program_id(0), tl.program_id(1)
    n = tile * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    q = tl.arange(0, 4)
    k = tl.arange(0, 32)
    k = k // 8 * (8 * PAIRS) + k % 8
    filled = (N + 15) // 16 * 16
    n = tl.where(n < filled, n, 0)  # rows beyond the last are the first once more, and write what it writes
    eight = (n // 8).to(tl.int64) * BLOCKS
    lane = (n % 8)[:, None, None] * 16 + q[None, :, None] * 4 + q[None, None, :]
    ws = words_ptr + eight[:, None, None] * (WORDS * 128) + lane
    step: tl.constexpr = 8 * SCALES if SCALE == "float" else 2 * SCALES  # bytes come four at a time
    if SCALES <= 1:
        at = eight * 8 + n % 8
    elif SCALE == "float":
        lane_scales = (n % 8)[:, None, None] * SCALES + q[None, None, :] + 0 * q[None, :, None]
        at = eight[:, None, None] * step + lane_scales
    else:
        at = eight[:, None, None] * step + (n % 8)[:, None, None] * (SCALES // 4) + 0 * q[None, :, None]
    xs = x_ptr + m[None, :].to(tl.int64) * STRIDE + k[:, None]
    half = (filled // 8).to(tl.int64) * BLOCKS  # blocks of eight rows of the first half, with GATED
    live = (m < M)[None, :]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    gate = tl.zeros((ROWS, TOKENS), tl.float32)
    for i in tl.range(turn * SPAN, min(turn * SPAN + SPAN, BLOCKS), num_stages=STAGES):
        xb, room = xs + i * COLUMNS, K - i * COLUMNS
        wb = ws + i * (WORDS * 128)
        sb, zb = scale_ptr + at + i * step, zero_ptr + at + i * step
        if GATED:
            gate = _block(
                gate, xb, live, k, room, wb, sb, zb,
                KIND, BITS, PAIRS, SCALE, SCALES, ZERO, OFFSET, LITERAL, FACTOR, DTYPE, ASM, EVEN, PLAIN,
            )  # fmt: skip
            wb, sb, zb = wb + half * (WORDS * 128), sb + half * step, zb + half * step
        acc = _block(
            acc, xb, live, k, room, wb, sb, zb,
            KIND, BITS, PAIRS, SCALE, SCALES, ZERO, OFFSET, LITERAL, FACTOR, DTYPE, ASM, EVEN, PLAIN,
        )  # fmt: skip
    if SPLIT > 1:
        inside = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        base = sums_ptr + tile.to(tl.int64) * (SPLIT * (1 + GATED) * ROWS * TOKENS) + inside
        size: tl.constexpr = ROWS * TOKENS
        tl.store(base + turn * size, acc)
        if GATED:
            tl.store(base + (SPLIT + turn) * size, gate)
        tl.debug_barrier()  # all stores of this program come before the count
        if tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(count_ptr + tile, 0)  # ready for the next launch
            acc = tl.zeros((ROWS, TOKENS), tl.float32)
            gate = tl.zeros((ROWS, TOKENS), tl.float32)
            for t in range(SPLIT):
                acc += tl.load(base + t * size, cache_modifier=".cg")
                if GATED:
                    gate += tl.load(base + (SPLIT + t) * size, cache_modifier=".cg")
            _finish(
                acc, gate, row_ptr, token_ptr, bias_ptr, residual_ptr, y_ptr, n, m, M, N, filled,
                GATED, TOKEN, BIAS, RESIDUAL, PLAIN,
            )  # fmt: skip
    else:
        _finish(
            acc, gate, row_ptr, token_ptr, bias_ptr, residual_ptr, y_ptr, n, m, M, N, filled,
            GATED, TOKEN, BIAS, RESIDUAL, PLAIN,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, gate, row_ptr, token_ptr, bias_ptr, residual_ptr, y_ptr, n, m, M, N, filled,
    GATED: tl.constexpr, TOKEN: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Factors of rows and tokens, bias, gate, residual, in float32; then one rounding."""
    inside = n < N
    if TOKEN:
        token = tl.load(token_ptr + m, mask=m < M, other=0.0)[None, :]
        acc, gate = acc * token, gate * token
    row = n + filled if GATED else n
    acc *= tl.load(row_ptr + row, mask=inside, other=0.0)[:, None]
    if BIAS:
        acc += wide(tl.load(bias_ptr + (n + N if GATED else n), mask=inside, other=0.0), PLAIN)[:, None]
    if GATED:
        gate *= tl.load(row_ptr + n, mask=inside, other=0.0)[:, None]
        if BIAS:
            gate += wide(tl.load(bias_ptr + n, mask=inside, other=0.0), PLAIN)[:, None]
        acc *= gate * tl.sigmoid(gate)
    at = m[None, :].to(tl.int64) * N + n[:, None]
    mask = (m < M)[None, :] & inside[:, None]
    if RESIDUAL:
        acc += wide(tl.load(residual_ptr + at, mask=mask, other=0.0), PLAIN)
    tl.store(y_ptr + at, narrow(acc, y_ptr.dtype.element_ty, PLAIN), mask=mask)


INTERPRETED = not isinstance(product_kernel, triton.JITFunction)  # TRITON_INTERPRET=1


def constants(weight: KernelWeight) -> dict[str, object]:
    """The compile-time constants of the kernel for a weight."""
    fmt, half = weight.format, weight.dtype == torch.float16
    magic = 1024 if half else 8388608 if fmt.bits == 8 else 128
    offset = -float(magic + (1 << (fmt.bits - 1)))
    bits = int(torch.tensor(offset, dtype=weight.dtype).view(torch.int16)) & 0xFFFF
    return {
        "KIND": "int" if fmt.kind == "int" else "fp",
        "BITS": fmt.bits,
        "PAIRS": PAIRS[fmt.bits],
        "SCALE": fmt.scale,
        "SCALES": 0 if weight.scale is None else weight.scale.shape[3],
        "ZERO": weight.zero is not None,
        "OFFSET": offset,
        "LITERAL": bits * 0x00010001 if weight.zero is None else None,
        "FACTOR": unscaled(fmt.kind, fmt.bits, half),
    }


def product(
    x: Tensor,
    weight: KernelWeight,
    tile: Tile,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    token: Tensor | None = None,
    asm: bool = True,
) -> Tensor:
    """x W^T, [M, out], or [M, out / 2] with ``gated`` (see ``lay_out_gated``); x: [M, in] in weight.dtype, rows contiguous.

    bias: [out]; residual: [M, out], added last; token: float32 [M], factors of rows of x; asm:
    codes are decoded in PTX where there is a choice. Raises ValueError where shapes or dtypes do not agree.
    """
    rows, columns = weight.shape
    out = rows // 2 if gated else rows
    m = x.shape[0]
    if x.dim() != 2 or x.shape[1] != columns or x.dtype != weight.dtype or x.stride(1) != 1:
        raise ValueError(
            f"x: expected rows of {columns} contiguous values in {weight.dtype}, found shape {tuple(x.shape)}, "
            f"strides {x.stride()}, {x.dtype}"
        )
    for name, t, shape in (("bias", bias, (rows,)), ("residual", residual, (m, out)), ("token", token, (m,))):
        if t is not None and (t.shape != shape or not t.is_contiguous()):
            raise ValueError(f"{name}: expected a contiguous tensor of shape {shape}, found {tuple(t.shape)}")
    y = torch.empty(m, out, dtype=x.dtype, device=x.device)
    blocks = weight.words.shape[1]
    split = min(tile.split, blocks) if m <= tile.tokens else 1  # one count a tile of rows
    span = triton.cdiv(blocks, split)
    split = triton.cdiv(blocks, span)
    tiles = triton.cdiv(out, tile.rows)
    sum_count = split * (2 if gated else 1)
    sums = (
        y if split == 1 else torch.empty(tiles, sum_count, tile.rows, tile.tokens, dtype=torch.float32, device=x.device)
    )
    grid = (tiles, split, triton.cdiv(m, tile.tokens))
    product_kernel[grid](
        x, weight.words, _or(stored_scales(weight), y), _or(weight.zero, y), weight.row, _or(token, y), _or(bias, y),
        _or(residual, y), y, sums, weight.counts,
        m, out, columns, x.stride(0), blocks, span,
        **constants(weight), GATED=gated, TOKEN=token is not None, BIAS=bias is not None, RESIDUAL=residual is not None,
        EVEN=columns % (32 * PAIRS[weight.format.bits]) == 0, ASM=asm and not INTERPRETED, PLAIN=INTERPRETED,
        ROWS=tile.rows, TOKENS=tile.tokens, STAGES=tile.stages, SPLIT=split, num_warps=tile.warps,
    )  # fmt: skip
    return y


def stored_scales(weight: KernelWeight) -> Tensor | None:
    """Scales as the kernel loads them: bytes four at a time."""
    return weight.scale if weight.scale is None or weight.format.scale == "float" else weight.scale.view(torch.int32)


def _or(t: Tensor | None, placeholder: Tensor) -> Tensor:
    """t, or a placeholder pointer that the kernel never reads."""
    return placeholder if t is None else t
