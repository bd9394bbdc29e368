"""The sparse part of a quantized weight: a few of its values kept in 16 bits, in compressed sparse rows (CSR).

A weight is dense + sparse: the dequantized codes plus, at the positions listed here, a value. Dense-and-sparse
quantization is from SpQR (Dettmers et al., arXiv 2306.03078) and SqueezeLLM (Kim et al., arXiv 2306.07629); which weights go
here is decided elsewhere (``solving``: the largest; ``sensitivity.repair``: those that the loss depends on).

Bytes: 2 of a value, the width of its column index, and a pointer per row. Widths are the smallest that hold what there is
(1, 2 or 4 bytes for columns, 2 or 4 for pointers), so a kept weight costs 24 bits in rows of up to 256 columns, 32 up
to 65,536.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIECES = ("sparse_rows", "sparse_columns", "sparse_values")
_PRODUCT_ELEMENTS = 1 << 22  # of tokens x values, held by one step of the product


@dataclass(frozen=True)
class Sparse:
    """rows: int32 [out + 1], where each row starts; columns: int32 [n], rising within a row; values: bf16 or fp16 [n]."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    @property
    def nnz(self) -> int:
        """Number of values."""
        return len(self.values)

    @property
    def positions(self) -> Tensor:
        """Row and column of every value, int64 [2, n], row by row."""
        return torch.stack((self.row_of_each, self.columns.long()))

    @property
    def row_of_each(self) -> Tensor:
        """Row of every value, int64 [n]."""
        counts = self.rows.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def slice(self, start: int, stop: int) -> Sparse:
        """The values of output rows [start, stop)."""
        a, b = int(self.rows[start]), int(self.rows[stop])
        return Sparse(self.rows[start : stop + 1] - a, self.columns[a:b], self.values[a:b])

    def to(self, device: torch.device) -> Sparse:
        """The matrix on another device."""
        return Sparse(self.rows.to(device), self.columns.to(device), self.values.to(device))


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sparse values in a ``dtype`` model: that dtype if it has 16 bits, else bfloat16 (which has its range)."""
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def index_dtypes(shape: tuple[int, int], nnz: int) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of (row pointers, columns) on disk."""
    columns = torch.uint8 if shape[1] <= 1 << 8 else torch.uint16 if shape[1] <= 1 << 16 else torch.int32
    return (torch.uint16 if nnz < 1 << 16 else torch.int32), columns


def specs(shape: tuple[int, int], nnz: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """{suffix: (dtype, shape)} of the tensors of a sparse part on disk; nothing for one without values."""
    if not nnz:
        return {}
    pointer, column = index_dtypes(shape, nnz)
    kinds = ((pointer, (shape[0] + 1,)), (column, (nnz,)), (value_dtype(dtype), (nnz,)))
    return dict(zip(PIECES, kinds, strict=True))


def sparse_bytes(shape: tuple[int, int], nnz: int, dtype: torch.dtype) -> int:
    """Bytes of a sparse part with ``nnz`` values: n (2 + column width) + (out + 1) pointer width."""
    return sum(d.itemsize * s[0] for d, s in specs(shape, nnz, dtype).values())


def write(sparse: Sparse, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors on disk, by suffix."""
    pointer, column = index_dtypes(shape, sparse.nnz)
    return dict(zip(PIECES, (sparse.rows.to(pointer), sparse.columns.to(column), sparse.values), strict=True))


def read(tensors: dict[str, Tensor]) -> Sparse | None:
    """The inverse of ``write``; None where there is no sparse part."""
    if PIECES[2] not in tensors:
        return None
    rows, columns, values = (tensors[p] for p in PIECES)
    return Sparse(rows.to(torch.int32), columns.to(torch.int32), values)


def make(flat: Tensor, values: Tensor, shape: tuple[int, int]) -> Sparse:
    """A sparse matrix of a shape. flat: int64 [n], ascending and unique positions in the row-major weight; values: [n]."""
    row = flat // shape[1]
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32, device=flat.device)
    starts[1:] = torch.bincount(row, minlength=shape[0]).cumsum(0)
    return Sparse(starts, (flat % shape[1]).to(torch.int32), values)


def merge(below: Sparse | None, above: Sparse, shape: tuple[int, int]) -> Sparse:
    """The values of both matrices; where they share a position, that of ``above``."""
    if below is None:
        return above
    (row, column), (row_a, column_a) = below.positions, above.positions
    old, new = row * shape[1] + column, row_a * shape[1] + column_a
    keep = ~torch.isin(old, new)
    flat, order = torch.cat((old[keep], new)).sort()
    return make(flat, torch.cat((below.values[keep], above.values))[order], shape)


def outlier_count(percent: float, shape: tuple[int, int]) -> int:
    """Number of weights that a percentage of a linear [out, in] is."""
    return round(percent / 100 * shape[0] * shape[1])


def largest(w: Tensor, count: int) -> Tensor:
    """Flat positions of the largest magnitudes of w [out, in], int64 [count], ascending; of equal ones the first."""
    order = torch.argsort(w.abs().flatten(), descending=True, stable=True)
    return order[:count].sort().values


def split(w: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Sparse]:
    """(w with its ``count`` largest magnitudes set to 0, those values in the 16-bit type of a ``dtype`` model)."""
    positions = largest(w, count)
    dense = w.clone(memory_format=torch.contiguous_format)
    values = dense.view(-1)[positions].to(value_dtype(dtype))
    dense.view(-1)[positions] = 0
    return dense, make(positions, values, (w.shape[0], w.shape[1]))


def add_(dense: Tensor, sparse: Sparse) -> Tensor:
    """dense [out, in] float32, with the values added in float32, in place."""
    row, column = sparse.positions
    dense[row, column] += sparse.values.to(dense.dtype)  # each position occurs once
    return dense


def product(x: Tensor, sparse: Sparse) -> Tensor:
    """float32 [..., out]: x [..., in] times the sparse part, summed in float32."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.zeros(len(flat), len(sparse.rows) - 1, device=x.device)
    row, column, values = sparse.row_of_each, sparse.columns.long(), sparse.values.float()
    step = max(1, _PRODUCT_ELEMENTS // max(1, sparse.nnz))
    for tokens, result in zip(flat.split(step), y.split(step), strict=True):
        result.index_add_(1, row, tokens[:, column].float() * values)
    return y.view(*x.shape[:-1], -1)
