"""The sparse part of a dense-and-sparse weight (compressed sparse rows) times x, summed in float32.

A program takes some rows of the weight and, for each token, walks through their values side by side; a row's values
are added up in a fixed order. The result is what ``matmul.product`` takes as its residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkit_kernels.decode import wide
from qkit_kernels.matmul import INTERPRETED


@triton.jit
def sparse_kernel(
    x_ptr,
    start_ptr,
    column_ptr,
    value_ptr,
    y_ptr,
    N,
    STRIDE,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """y [M, N] float32. STEP: values of a row that are taken at a time."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1).to(tl.int64)
    start = tl.load(start_ptr + n, mask=n < N, other=0)
    stop = tl.load(start_ptr + n + 1, mask=n < N, other=0)
    acc = tl.zeros((ROWS, STEP), tl.float32)
    for i in range(0, tl.max(stop - start, 0), STEP):
        at = start[:, None] + i + tl.arange(0, STEP)[None, :]
        mask = at < stop[:, None]
        column = tl.load(column_ptr + at, mask=mask, other=0)
        value = wide(tl.load(value_ptr + at, mask=mask, other=0.0), PLAIN)
        acc += value * wide(tl.load(x_ptr + m * STRIDE + column, mask=mask, other=0.0), PLAIN)
    tl.store(y_ptr + m * N + n, tl.sum(acc, 1), mask=n < N)


def sparse_product(x: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """x [M, in] (rows contiguous) times the sparse part: float32 [M, out].

    rows: int32 [out + 1], where each row starts; columns: int32 [n]; values: [n], 16-bit floats.
    """
    m, n = x.shape[0], len(rows) - 1
    y = torch.empty(m, n, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, 16), m)
    sparse_kernel[grid](x, rows, columns, values, y, n, x.stride(0), ROWS=16, STEP=16, PLAIN=INTERPRETED, num_warps=2)
    return y
