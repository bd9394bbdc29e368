"""Products with quantized weights on a GPU, through the Triton kernels.

product    activations in float16 or bfloat16 (matmul.py): integers of 2, 3, 4 and 8 bits, E2M1 and E4M3
product8   activations rounded to INT8 token by token (matmul8.py): integers of 4 and 8 bits
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkit_kernels.layout import Laid, block_columns, codes_of, lay_out, why_not
from qkit_kernels.weight import Format, Weight

OPS = ("product8", "product")


def supported(op: str, fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether a kernel multiplies weights [out, in] of that format with activations in ``dtype``."""
    if why_not(fmt, shape, dtype) is not None:
        return False
    if op == "product":
        return True
    coarse = fmt.group is None or fmt.group % block_columns(fmt.bits) == 0 or fmt.group >= shape[1]
    return op == "product8" and fmt.kind == "int" and fmt.bits in (4, 8) and coarse


def prepare(weight: Weight, dtype: torch.dtype) -> Laid:
    """The weight in the kernels' layout, on the device that it is on."""
    return lay_out(weight, dtype)


def linear(x: Tensor, laid: Laid, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [..., in] in the dtype that the weight was laid out for, to [..., out]; bias [out], residual [..., out]."""
    from qkit_kernels.matmul import product  # imports Triton, which the CPU does without
    from qkit_kernels.tiles import choose

    flat = x.reshape(-1, x.shape[-1])
    beside = None if residual is None else residual.reshape(-1, residual.shape[-1])
    y = product(flat, laid, choose(laid, len(flat), x.device), bias, beside)
    return y.view(*x.shape[:-1], -1)


def linear8(x: Tensor, laid: Laid, bias: Tensor | None = None) -> Tensor:
    """The same with x rounded to INT8 token by token."""
    from qkit_kernels.matmul8 import product8
    from qkit_kernels.tiles import choose

    flat = x.reshape(-1, x.shape[-1])
    return product8(flat, laid, choose(laid, len(flat), x.device), bias).view(*x.shape[:-1], -1)


def codes(laid: Laid, like: Weight) -> Tensor:
    """The codes that ``prepare`` was given, [out, in] in the dtype of ``like.codes``."""
    stored = codes_of(laid)
    if laid.format.kind == "int":
        return (stored - (1 << (laid.format.bits - 1))).to(torch.int8)
    return stored.to(torch.uint8).view(like.codes.dtype)


def to(laid: Laid, device: torch.device) -> Laid:
    """The same on another device."""
    moved = {
        n: t.to(device) for n in ("words", "scale", "zero", "row", "counts") if (t := getattr(laid, n)) is not None
    }
    return replace(laid, **moved)
