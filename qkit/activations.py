"""Quantization of activations at run time, the same in calibration, in evaluation and in the packed model.

Computed in float32 and returned in the dtype of the input. Follows compressed-tensors 0.20: symmetric, amax
over a token (or a group of its channels), divided by half the code range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.formats import FP8_MAX, Format
from qkit.qtensor import Params, effective_scale, half_range, params_from_range, qdq


def token_scale(x: Tensor, fmt: Format) -> Tensor:
    """float32 [..., 1]: amax of each token / half the code range; a token of zeros gets 1."""
    scale = x.abs().amax(-1, keepdim=True).to(torch.float32) / half_range(fmt)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def static_scale(amax: float, fmt: Format) -> float:
    """What a static activation format stores: the tensor scale (FP8: amax / 448), or NVFP4's global scale
    (2688 / amax, a multiplier)."""
    amax = max(amax, 1e-12)
    return FP8_MAX * half_range(fmt) / amax if fmt.strategy == "tensor_group" else amax / half_range(fmt)


def quantize_activations(x: Tensor, fmt: Format, static: Tensor | None = None) -> Tensor:
    """Quantize and dequantize x [..., channels] in the given activation format.

    static: float32 [1], from ``static_scale``: the scale of a static format, the global scale of NVFP4.
    """
    wide = x.to(torch.float32)
    if fmt.strategy == "token":
        return qdq(wide, token_scale(x, fmt), None, fmt).to(x.dtype)
    if fmt.strategy == "tensor":
        assert static is not None
        return qdq(wide, static.to(torch.float32), None, fmt).to(x.dtype)
    assert fmt.group is not None
    grouped = wide.unflatten(-1, (-1, fmt.group))
    amax = grouped.abs().amax(-1)
    if fmt.scale == "model":  # FP8 in groups: the scale stays in float32, it is never stored
        scale = amax / half_range(fmt)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    else:
        p: Params = params_from_range(-amax, amax, fmt, torch.float32, static)
        scale = effective_scale(p, fmt)
    return qdq(grouped, scale[..., None], None, fmt).flatten(-2).to(x.dtype)
