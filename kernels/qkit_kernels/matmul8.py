"""y = x W^T with x rounded to INT8 token by token: integer products, summed exactly, scaled in the end.

``quantize`` does all that is done to x in one launch: the largest magnitude of a token, scale = that / 127.5, codes
(to nearest, ties to even) in the order in which the tensor core takes them, and their sums over blocks of columns.

The layout (layout.py) is the same as for 16-bit activations. The four bytes of a word are, as they are, a register of
``mma.m16n8k32``; for 4-bit codes the low nibbles of the four are one such register and the high nibbles another. So the
columns of a block are taken in the order (nibble e, unit u, word w, byte i), which is that of ``_column``.

Four-bit codes are multiplied unsigned; what that is too much, (8 + zero point) times the sum of x, is subtracted
afterwards (subtraction after multiplication: QServe, Lin et al., arXiv 2405.04532).

NVFP4 and MXFP4 weights take another way, ``view8``: 2 E2M1 is an integer of at most 12, so their product with INT8 codes
is one of integers too (6Bit-Diffusion, arXiv 2603.18742, leaves the cast open; this is the exact one). But a scale
every 16 columns would take the sums out of the tensor core every 16 columns: a conversion and a multiplication in
float32 for 16 products, more than the 16-bit tensor core needs for all of it. E2M1 times E4M3 has six significant bits
and a code of x eight: both are exact in float16 and bfloat16, and so is each product in the float32 sum. So the
integer codes of x go through ``matmul.product`` as 16-bit numbers, and the token's scale multiplies the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkit_kernels.decode import narrow, wide
from qkit_kernels.layout import PAIRS, KernelWeight, block_columns
from qkit_kernels.matmul import INTERPRETED, Tile, product

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds a float32 to the nearest integer


@triton.jit
def _column(k, PAIRS: tl.constexpr):
    """Column, within a block, of place k in the order (e, u, w, i)."""
    i, w, u, e = k % 4, k // 4 % 4, k // 16 % 4, k // 64
    j = (i % 2) * (PAIRS // 2) + e  # byte i % 2 of a half holds pairs (i % 2) PAIRS / 2 and on
    return u * (8 * PAIRS) + 8 * j + 2 * w + i // 2


@triton.jit
def quantize_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    sum_ptr,
    K,
    STRIDE,
    BLOCKS,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    ORDERED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """A program a token: codes int8 [M, BLOCKS, 32 PAIRS], scale float32 [M], sums int32 [M, BLOCKS]; not ORDERED:
    codes [M, K] as they come, in the dtype of code_ptr, and no sums."""
    m = tl.program_id(0)
    COLUMNS: tl.constexpr = 32 * PAIRS
    chunk_max = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        x = wide(tl.load(x_ptr + m.to(tl.int64) * STRIDE + k, mask=k < K, other=0.0), PLAIN)
        chunk_max = tl.maximum(chunk_max, tl.abs(x))
    amax = tl.max(chunk_max, 0)
    scale = tl.where(amax == 0, 1.0, tl.div_rn(amax, 127.5))
    tl.store(scale_ptr + m, scale)
    position = tl.arange(0, COLUMNS)
    column = _column(position, PAIRS) if ORDERED else position
    for b in range(0, BLOCKS):
        k = b * COLUMNS + column
        x = wide(tl.load(x_ptr + m.to(tl.int64) * STRIDE + k, mask=k < K, other=0.0), PLAIN)
        code = tl.div_rn(x, scale) + ROUND - ROUND
        code = tl.minimum(tl.maximum(code, -128.0), 127.0)
        if ORDERED:
            int_code = code.to(tl.int32)
            tl.store(code_ptr + (m.to(tl.int64) * BLOCKS + b) * COLUMNS + position, int_code.to(tl.int8))
            tl.store(sum_ptr + m.to(tl.int64) * BLOCKS + b, tl.sum(int_code, 0))
        else:
            tl.store(code_ptr + m.to(tl.int64) * K + k, narrow(code, code_ptr.dtype.element_ty, PLAIN), mask=k < K)


@triton.jit
def product8_kernel(
    code_ptr, token_ptr, sum_ptr, words_ptr, scale_ptr, zero_ptr, row_ptr, bias_ptr, y_ptr, sums_ptr, count_ptr,
    M, N, BLOCKS, SPAN,
    BITS: tl.constexpr, PAIRS: tl.constexpr, SCALED: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr,
    PLAIN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y [M, N]. SCALED: a block has its own scale; else the row factor has all of it."""
    COLUMNS: tl.constexpr = 32 * PAIRS
    HALF: tl.constexpr = 1 << (BITS - 1)
    tile, turn = tl.program_id(0), tl.program_id(1)
    n = tile * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    q = tl.arange(0, 4)
    k = tl.arange(0, 64)
    filled = (N + 15) // 16 * 16
    n = tl.where(n < filled, n, 0)  # rows beyond the last are the first once more, and write what it writes
    eight = (n // 8).to(tl.int64) * BLOCKS
    ws = words_ptr + eight[:, None, None] * 128 + (n % 8)[:, None, None] * 16 + q[None, :, None] * 4 + q[None, None, :]
    at = eight * 8 + n % 8
    xs = code_ptr + m[None, :].to(tl.int64) * BLOCKS * COLUMNS + k[:, None]
    live = m < M
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    int_acc = tl.zeros((ROWS, TOKENS), tl.int32)
    for b in tl.range(turn * SPAN, min(turn * SPAN + SPAN, BLOCKS), num_stages=STAGES):
        words = tl.load(ws + b * 128)
        int_sum = tl.zeros((ROWS, TOKENS), tl.int32) if SCALED else int_acc
        for e in tl.static_range(8 // BITS):
            four = words ^ -2139062144 if BITS == 8 else (words >> (BITS * e)) & (((1 << BITS) - 1) * 0x01010101)
            even = tl.join(four.to(tl.int8), (four >> 16).to(tl.int8))
            odd = tl.join((four >> 8).to(tl.int8), (four >> 24).to(tl.int8))
            codes = tl.join(even, odd).permute(0, 2, 1, 3, 4).reshape(ROWS, 64)
            x = tl.load(xs + b * COLUMNS + 64 * e, mask=live[None, :], other=0)
            int_sum = tl.dot(codes, x, int_sum, out_dtype=tl.int32)
        code_sum = tl.load(sum_ptr + m.to(tl.int64) * BLOCKS + b, mask=live, other=0)[None, :]
        if ZERO:
            int_sum -= (tl.load(zero_ptr + at + b * 8).to(tl.int32) + (0 if BITS == 8 else HALF))[:, None] * code_sum
        elif BITS < 8:
            int_sum -= HALF * code_sum
        if SCALED:
            acc += int_sum.to(tl.float32) * wide(tl.load(scale_ptr + at + b * 8), PLAIN)[:, None]
        else:
            int_acc = int_sum
    if not SCALED:
        acc = int_acc.to(tl.float32)
    if SPLIT > 1:
        inside = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        base = sums_ptr + tile.to(tl.int64) * (SPLIT * ROWS * TOKENS) + inside
        tl.store(base + turn * (ROWS * TOKENS), acc)
        tl.debug_barrier()
        if tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(count_ptr + tile, 0)
            acc = tl.zeros((ROWS, TOKENS), tl.float32)
            for t in range(SPLIT):
                acc += tl.load(base + t * (ROWS * TOKENS), cache_modifier=".cg")
            _finish8(acc, token_ptr, row_ptr, bias_ptr, y_ptr, n, m, M, N, BIAS, PLAIN)
    else:
        _finish8(acc, token_ptr, row_ptr, bias_ptr, y_ptr, n, m, M, N, BIAS, PLAIN)


@triton.jit
def _finish8(acc, token_ptr, row_ptr, bias_ptr, y_ptr, n, m, M, N, BIAS: tl.constexpr, PLAIN: tl.constexpr):
    """Row factors, token scales, bias; then one rounding."""
    inside, live = n < N, m < M
    acc *= tl.load(row_ptr + n, mask=inside, other=0.0)[:, None]
    acc *= tl.load(token_ptr + m, mask=live, other=0.0)[None, :]
    if BIAS:
        acc += wide(tl.load(bias_ptr + n, mask=inside, other=0.0), PLAIN)[:, None]
    at = m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y_ptr + at, narrow(acc, y_ptr.dtype.element_ty, PLAIN), mask=live[None, :] & inside[:, None])


def takes(weight: KernelWeight) -> bool:
    """Whether ``product8`` supports a weight: 4- or 8-bit integers with scales of whole blocks or coarser."""
    one = weight.scale is None or weight.scale.shape[3] == 1
    return weight.format.kind == "int" and weight.format.bits in (4, 8) and one


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, in], rows contiguous, to (codes int8 [M, blocks, columns of a block] in the kernel's order, scale float32
    [M], sums of codes int32 [M, blocks]), for a weight of ``bits`` bits."""
    m, columns = x.shape
    blocks = triton.cdiv(columns, block_columns(bits))
    codes = torch.empty(m, blocks, block_columns(bits), dtype=torch.int8, device=x.device)
    sums = torch.empty(m, blocks, dtype=torch.int32, device=x.device)
    return codes, _quantized(x, codes, sums, bits, ordered=True), sums


def _quantized(x: Tensor, codes: Tensor, sums: Tensor, bits: int, ordered: bool) -> Tensor:
    """Scales of tokens, float32 [M]; fills codes and sums."""
    m, columns = x.shape
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(columns, block_columns(bits))
    chunk = min(4096, triton.next_power_of_2(columns))
    quantize_kernel[(m,)](
        x,
        codes,
        scale,
        sums,
        columns,
        x.stride(0),
        blocks,
        PAIRS=PAIRS[bits],
        CHUNK=chunk,
        ORDERED=ordered,
        PLAIN=INTERPRETED,
        num_warps=8,
    )
    return scale


def view8(
    x: Tensor, weight: KernelWeight, tile: Tile, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x [M, in] in weight.dtype, rows contiguous, rounded to INT8 token by token, times an E2M1 weight: [M, out], what the
    integers and their scales give, but for the order of float32 sums.

    bias: [out]; residual: [M, out], added last. Raises ValueError for a weight that is not E2M1.
    """
    if weight.format.kind != "fp4":
        raise ValueError(f"the INT8 view of {weight.format}: expected E2M1 codes; integers are what product8 takes")
    codes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = _quantized(x, codes, codes, weight.format.bits, ordered=False)
    return product(codes, weight, tile, bias, residual, token=scale)


def product8(x: Tensor, weight: KernelWeight, tile: Tile, bias: Tensor | None = None) -> Tensor:
    """x [M, in] in weight.dtype, rounded to INT8 token by token, times the weight: [M, out].

    Raises ValueError for a weight that ``takes`` refuses.
    """
    if not takes(weight):
        raise ValueError(
            f"INT8 activations with {weight.format}: expected 4- or 8-bit integers, groups of whole blocks"
        )
    rows, _ = weight.shape
    m, blocks = x.shape[0], weight.words.shape[1]
    codes, scale, sums = quantize(x, weight.format.bits)
    y = torch.empty(m, rows, dtype=x.dtype, device=x.device)
    span = triton.cdiv(blocks, min(tile.split, blocks) if m <= tile.tokens else 1)
    split, tiles = triton.cdiv(blocks, span), triton.cdiv(rows, tile.rows)
    space = y if split == 1 else torch.empty(tiles, split, tile.rows, tile.tokens, dtype=torch.float32, device=x.device)
    product8_kernel[(tiles, split, triton.cdiv(m, tile.tokens))](
        codes, scale, sums, weight.words, y if weight.scale is None else weight.scale,
        y if weight.zero is None else weight.zero, weight.row, y if bias is None else bias, y, space, weight.counts,
        m, rows, blocks, span,
        BITS=weight.format.bits, PAIRS=PAIRS[weight.format.bits], SCALED=weight.scale is not None,
        ZERO=weight.zero is not None, BIAS=bias is not None, PLAIN=INTERPRETED, ROWS=tile.rows, TOKENS=tile.tokens,
        STAGES=tile.stages, SPLIT=split, num_warps=tile.warps,
    )  # fmt: skip
    return y
