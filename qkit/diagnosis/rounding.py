"""How far rounding alone takes a weight from the original: the error that a format explains."""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.tensor.formats import GGUF_FORMATS, Format
from qkit.tensor.qtensor import dequantize, find_params, quantize

_ROWS = 256  # of a weight, which are enough to tell
_EIGHT = ("Q8_1", "Q8_K")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def rounding_error(original: Tensor, fmt: Format | None) -> float:
    """The relative error of a matrix that is rounded to the nearest value of a format; 0 for none."""
    if fmt is None:
        return 0.0
    w = original.reshape(-1, original.shape[-1])
    w = w[:: max(1, len(w) // _ROWS)][:_ROWS].to(torch.float32)
    if fmt.gguf:
        w = w[:, : len(w[0]) // fmt.columns * fmt.columns]
        return _relative(dequantize(quantize(w, find_params(w, fmt, torch.float32), fmt)), w) if w.numel() else 0.0
    grouped = _grouped(w, (fmt.block or (128, 128))[1] if fmt.strategy == "block" else fmt.group or w.shape[-1])
    return _relative(_rounded(grouped, fmt), grouped)


def gguf_format(dtype: str) -> Format:
    """The format by which the error of a type of GGUF is judged: the type itself, or the next one of no more bits that qkit
    rounds to. Types below Q2_K are judged by it: their error is less than three times its own."""
    own = GGUF_FORMATS.get(dtype.lower()) or GGUF_FORMATS.get(f"gguf_{dtype.lower()}")
    return own or GGUF_FORMATS["q3_k" if dtype in ("IQ3_S", "IQ3_XXS") else "q8_0" if dtype in _EIGHT else "q2_k"]


def _relative(rounded: Tensor, w: Tensor) -> float:
    norm = float(w.norm())
    return float((rounded - w).norm()) / norm if norm else 0.0


def _grouped(w: Tensor, group: int) -> Tensor:
    """[groups, group]; the last columns are left out where groups do not divide them."""
    columns = w.shape[-1] // group * group or w.shape[-1]
    return w[:, :columns].reshape(-1, min(group, columns))


def _rounded(x: Tensor, fmt: Format) -> Tensor:
    largest = x.abs().amax(1, keepdim=True).clamp(min=1e-12)
    if fmt.kind == "fp4":
        table = torch.tensor((*_E2M1, *(-v for v in _E2M1[1:])))
        scale = largest / 6
        return _nearest(x / scale, table) * scale
    if fmt.kind == "fp8":
        scale = largest / 448
        return (x / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale
    steps = (1 << fmt.bits) - 1
    if fmt.symmetric:
        scale = largest / (steps / 2)
        return (x / scale).round().clamp(-(steps + 1) // 2, steps // 2) * scale
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / steps).clamp(min=1e-12)
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp(0, steps) - zero) * scale


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    ordered = table.sort().values
    middles = (ordered[1:] + ordered[:-1]) / 2
    return ordered[torch.bucketize(x.contiguous(), middles)]
