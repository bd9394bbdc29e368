"""Views of an NVFP4 weight as an INT8 matrix, exact or with row scales (6Bit-Diffusion, section 4.1).

The paper casts the stored weight to INT8 before the product and does not say how. Twice an E2M1 value is a whole number of
at most 12, so that the exact view costs nothing but a scale for every group of 16; the view by rows has one scale a
row, as plain INT8 products want, and rounds once more (0.8 % of a Gaussian weight beside NVFP4's own 9.5 %). Both are for
engines that multiply in INT8; qkit's own operators take the packed weight, which is the same product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.tensor.qtensor import QTensor, codes_to_grid, dequantize, effective_scale

GROUP = 16


def exact_view(q: QTensor) -> tuple[Tensor, Tensor]:
    """(int8 [out, in], float32 [out, in / 16]): codes times the scale of their group are the dequantized weight.

    q: an NVFP4 weight without a sparse or a low-rank part
    """
    _check(q)
    codes = (2 * codes_to_grid(q.codes, q.format)).to(torch.int8)
    return codes, effective_scale(q.params, q.format) / 2


def exact_product(x: Tensor, scale: Tensor, codes: Tensor, groups: Tensor) -> Tensor:
    """x [n, in] int8 with scales [n, 1] times an ``exact_view``: int32 sums within a group, float32 [n, out] over groups.

    The integers of a group are exact: 16 * 127 * 12 is far below 2^31.
    """
    wide = x.to(torch.int32).unflatten(-1, (-1, GROUP))
    weight = codes.to(torch.int32).unflatten(-1, (-1, GROUP))
    sums = torch.einsum("ngk,ogk->nog", wide, weight)
    return (sums.to(torch.float32) * groups).sum(-1) * scale


def row_view(q: QTensor) -> tuple[Tensor, Tensor]:
    """(int8 [out, in], float32 [out, 1]): the dequantized weight rounded to INT8 with one scale a row."""
    _check(q)
    weight = dequantize(q).to(torch.float32)
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (weight / scale).round().to(torch.int8), scale


def _check(q: QTensor) -> None:
    if q.format.name != "nvfp4" or q.sparse is not None or q.low_rank is not None:
        raise ValueError(f"an INT8 view of {q.format.name}: expected a plain NVFP4 weight")
