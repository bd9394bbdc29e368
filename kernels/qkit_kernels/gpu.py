"""Products with quantized weights on a GPU, through the Triton kernels.

product8   activations rounded to INT8 token by token (matmul8.py): integers of 4 and 8 bits
view8      the same with E2M1
product    activations in float16 or bfloat16 (matmul.py): integers of 2, 3, 4 and 8 bits, E2M1 and E4M3
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit_kernels.layout import KernelWeight, block_columns, codes_of, lay_out, why_not
from qkit_kernels.weight import CodeFormat, Weight

OPS = ("product8", "view8", "product")
INTEGERS = ("product8", "view8")  # operators that quantize the activations themselves


@dataclass(frozen=True)
class GpuWeight:
    """A weight in the layout of one of OPS. weight: its format, scales and zero points, without codes."""

    op: str
    weight: Weight
    kernel_weight: KernelWeight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.kernel_weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (self.weight.scale, self.weight.zero, self.weight.global_scale)
        return self.kernel_weight.nbytes + sum(t.nbytes for t in tensors if t is not None)


def supported(op: str, fmt: CodeFormat, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a kernel multiplies weights [out, in] of that format with activations in ``dtype``."""
    if why_not(fmt, shape, dtype) is not None:
        return False
    if op == "product":
        return True
    if op == "view8":
        return fmt.kind == "fp4"
    coarse = fmt.group is None or fmt.group % block_columns(fmt.bits) == 0 or fmt.group >= shape[1]
    return op == "product8" and fmt.kind == "int" and fmt.bits in (4, 8) and coarse


def prepare(weight: Weight, dtype: torch.dtype, op: str = "product") -> GpuWeight:
    """The weight in the kernels' layout, on its device, for activations in ``dtype``."""
    return GpuWeight(op, replace(weight, codes=weight.codes.new_empty(0)), lay_out(weight, dtype))


def linear(x: Tensor, p: GpuWeight, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [rows, in] times the weight, [rows, out] in x's dtype; bias [out]; residual [rows, out] (not for product8)."""
    from qkit_kernels.matmul import product  # brings Triton, which the CPU does without
    from qkit_kernels.matmul8 import product8, view8
    from qkit_kernels.tiles import choose

    x_narrow = x.to(p.kernel_weight.dtype)
    tile = choose(p.kernel_weight, len(x), x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        if p.op == "product8":
            return product8(x_narrow, p.kernel_weight, tile, bias).to(x.dtype)
        return (view8 if p.op == "view8" else product)(x_narrow, p.kernel_weight, tile, bias, residual).to(x.dtype)


def sparse(x: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """x [rows, in] times the sparse part of a weight (sparse.py): float32 [rows, out], a residual of ``linear``."""
    from qkit_kernels.sparse import sparse_product

    with torch.cuda.device_of(x):
        return sparse_product(x, rows, columns, values)


def codes(p: GpuWeight) -> Tensor:
    """The codes of the weight before ``prepare``, [out, in] in their dtype."""
    fmt, stored = p.kernel_weight.format, codes_of(p.kernel_weight)
    if fmt.kind == "int":
        return (stored - (1 << (fmt.bits - 1))).to(torch.int8)
    return stored.to(torch.uint8).view(p.weight.codes.dtype)


def to(weight: KernelWeight, device: torch.device) -> KernelWeight:
    """The weight on another device."""
    tensors = {
        n: t.to(device) for n in ("words", "scale", "zero", "row", "counts") if (t := getattr(weight, n)) is not None
    }
    return replace(weight, **tensors)
