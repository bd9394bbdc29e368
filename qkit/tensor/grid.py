"""The grid of codes of a format: its range, rounding to it, and the codes that stand for its values."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import torch
from torch import Tensor

from qkit.tensor.formats import FP4_MAX, FP8_MAX, Format

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes by code; bit 3 of a code is the sign
# The values of IQ4_NL and IQ4_XS by code, as llama.cpp has them.
NL4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
_NL4_BETWEEN = tuple((a + b) / 2 for a, b in pairwise(NL4))  # multiples of a half, so that a table by halves is exact
_NL4_CELLS = tuple(
    b - a for a, b in pairwise((2 * NL4[0] - _NL4_BETWEEN[0], *_NL4_BETWEEN, 2 * NL4[-1] - _NL4_BETWEEN[-1]))
)
_NL4_CODES = tuple(bisect_left(_NL4_BETWEEN, half / 2) for half in range(int(2 * NL4[0]), int(2 * NL4[-1]) + 1))


def code_range(fmt: Format) -> tuple[float, float]:
    """Smallest and largest value of the code grid."""
    if fmt.kind == "uint":
        return 0.0, 2.0**fmt.bits - 1
    if fmt.kind == "nl4":
        return NL4[0], NL4[-1]
    if fmt.kind == "int":
        return -(2.0 ** (fmt.bits - 1)), 2.0 ** (fmt.bits - 1) - 1
    return (-FP4_MAX, FP4_MAX) if fmt.kind == "fp4" else (-FP8_MAX, FP8_MAX)


def half_range(fmt: Format) -> float:
    """The divisor of amax in a symmetric scale: (2^b - 1) / 2 for integers, the largest value for floats."""
    return (2.0**fmt.bits - 1) / 2 if fmt.kind == "int" else code_range(fmt)[1]


def round_to_grid(x: Tensor, fmt: Format) -> Tensor:
    """The nearest value of the format's code grid (ties to even), in x's dtype. x: already divided by the scale."""
    return round_to_grid_(x.clone(), fmt)


def round_to_grid_(x: Tensor, fmt: Format) -> Tensor:
    """``round_to_grid`` in place."""
    low, high = code_range(fmt)
    x.clamp_(low, high)
    if fmt.kind in ("int", "uint"):
        return x.round_()
    if fmt.kind == "nl4":
        return x.copy_(torch.tensor(NL4, dtype=x.dtype, device=x.device)[_nl4_codes(x)])
    if fmt.kind == "fp8":
        return x.copy_(x.to(torch.float8_e4m3fn))
    step = grid_spacing(x, fmt)
    return x.div_(step).round_().mul_(step)


def grid_spacing(x: Tensor, fmt: Format) -> Tensor:
    """Distance between neighbours on the code grid around x, in x's dtype; x: within the code range.

    Of IQ4_NL and IQ4_XS it is the width of the cell of numbers that x's code stands for. For floats it is a power of two (x
    with its mantissa cleared) times one step of the mantissa, down to the subnormal numbers (E2M1: 0.5 below 2, 1 below 4,
    2 above). Comparisons would give the same, but take twenty times as long.
    """
    if fmt.kind in ("int", "uint"):
        return torch.ones((), dtype=x.dtype)
    if fmt.kind == "nl4":
        return torch.tensor(_NL4_CELLS, dtype=x.dtype, device=x.device)[_nl4_codes(x)]
    smallest, step = (1.0, 0.5) if fmt.kind == "fp4" else (2.0**-6, 2.0**-3)
    exponent = (x.to(torch.float32).view(torch.int32) & 0x7F800000).view(torch.float32)
    return exponent.clamp_(min=smallest).mul_(step).to(x.dtype)


def grid_to_codes(values: Tensor, fmt: Format) -> Tensor:
    """Values of the code grid (float) to the codes that are stored."""
    if fmt.kind in ("int", "uint"):
        return values.to(torch.int8)
    if fmt.kind == "nl4":
        return _nl4_codes(values).to(torch.int8)
    if fmt.kind == "fp8":
        return values.to(torch.float8_e4m3fn)
    index = torch.bucketize(values.abs(), torch.tensor(E2M1, dtype=values.dtype, device=values.device))
    negative = values < 0 if fmt.gguf else torch.signbit(values)  # llama.cpp knows no negative zero
    return (index.to(torch.uint8)) | (negative.to(torch.uint8) << 3)


def codes_to_grid(codes: Tensor, fmt: Format) -> Tensor:
    """float32 values of the code grid; the inverse of ``grid_to_codes``."""
    if fmt.kind == "nl4":
        return torch.tensor(NL4, device=codes.device)[codes.to(torch.int32)]
    if fmt.kind != "fp4":
        return codes.to(torch.float32)
    lut = torch.tensor((*E2M1, *(-v for v in E2M1)), dtype=torch.float32, device=codes.device)
    return lut[codes.to(torch.int32)]


def _nl4_codes(x: Tensor) -> Tensor:
    """Index of the nearest value of NL4, int32. x: within their range"""
    halves = (x * 2).ceil_().sub_(2 * NL4[0]).to(torch.int32)
    return torch.tensor(_NL4_CODES, dtype=torch.int32, device=x.device)[halves]
