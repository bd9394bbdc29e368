"""Quantization of activations at run time, the same in calibration, in evaluation and in the packed model.

Computed in float32 and returned in the dtype of the input. Follows compressed-tensors 0.20: symmetric, amax
over a token (or a group of its channels), divided by half the code range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.tensor.formats import FP8_MAX, Format
from qkit.tensor.qtensor import Params, effective_scale, half_range, params_from_range, qdq

_LOWER = 4.0  # the lower ceiling of Four Over Six: a group's largest value may be at 4 instead of 6


def token_scale(x: Tensor, fmt: Format) -> Tensor:
    """float32 [..., 1]: amax of each token / half the code range; a token of zeros gets 1."""
    scale = x.abs().amax(-1, keepdim=True).to(torch.float32) / half_range(fmt)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def static_scale(amax: float, fmt: Format) -> float:
    """The stored scale of a static activation format: the tensor scale (FP8: amax / 448), or NVFP4's global scale
    (2688 / amax, a multiplier). 1 where calibration inputs are all zero (our choice): other inputs would saturate."""
    if amax == 0:
        return 1.0
    amax = max(amax, 1e-12)
    return FP8_MAX * half_range(fmt) / amax if fmt.strategy == "tensor_group" else amax / half_range(fmt)


def storable_scale(scale: float, dtype: torch.dtype) -> float:
    """The scale, raised to the smallest value above 0 that ``dtype`` holds (float16: 6e-8): a scale of 0 cannot divide.

    A raised scale uses less of the grid. This costs no precision, since FP8 is a floating-point grid.
    """
    info = torch.finfo(dtype)
    return max(scale, info.tiny * info.eps)


def quantize_activations(x: Tensor, fmt: Format, static: Tensor | None = None, residual: int = 0) -> Tensor:
    """x [..., channels] quantized and dequantized in an activation format, in x's dtype.

    static: float32 [1], from ``static_scale``: the scale of a static format, the global scale of NVFP4.
    residual: number of residual channels, the first ones, in whole groups (formats with groups only). Their rounding error is
    quantized in the same way and added (ARCQuant, arXiv 2601.07475). With residual channels, NVFP4's groups use the better of
    two scales, with the largest value at 6 or at 4, where the grid is finer (Four Over Six, arXiv 2512.02010).
    """
    values = x.to(torch.float32)
    if residual and fmt.group is not None:
        first_pass = in_groups(values, fmt, static, two_scales=True)
        second_pass = in_groups((values - first_pass)[..., :residual], fmt, static, two_scales=True)
        first_pass[..., :residual] += second_pass
        return first_pass.to(x.dtype)
    if fmt.strategy == "token":
        return qdq(values, token_scale(x, fmt), None, fmt).to(x.dtype)
    if fmt.strategy == "tensor":
        assert static is not None
        return qdq(values, static.to(torch.float32), None, fmt).to(x.dtype)
    return in_groups(values, fmt, static, two_scales=False).to(x.dtype)


def in_groups(x: Tensor, fmt: Format, static: Tensor | None, two_scales: bool) -> Tensor:
    """x quantized and dequantized in groups, float32 [.., channels]; two_scales: NVFP4's groups use the better of two
    scales.
    """
    assert fmt.group is not None
    grouped = x.unflatten(-1, (-1, fmt.group))
    amax = grouped.abs().amax(-1)

    def at(ceiling: float) -> Tensor:
        """The groups rounded with their largest value at ``ceiling``."""
        if fmt.scale == "model":  # FP8 in groups: the scale stays in float32, it is never stored
            scale = amax / ceiling
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        else:
            limit = amax * (half_range(fmt) / ceiling)
            p: Params = params_from_range(-limit, limit, fmt, torch.float32, static)
            scale = effective_scale(p, fmt)
        return qdq(grouped, scale[..., None], None, fmt)

    rounded = at(half_range(fmt))
    if two_scales and fmt.scale == "e4m3":
        lower_rounded = at(_LOWER)
        lower_error, error = ((t - grouped).square().sum(-1, keepdim=True) for t in (lower_rounded, rounded))
        rounded = torch.where(lower_error < error, lower_rounded, rounded)
    return rounded.flatten(-2)
