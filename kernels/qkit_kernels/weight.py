"""Quantized weights as the operators receive them: codes and scales of a checkpoint.

A weight is [out, in]. It has one code for each element, as in a checkpoint after unpacking; ``prepare`` arranges them for an
operator. ``dequantize`` is the reference that every operator is tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class CodeFormat:
    """A number format of weights.

    kind:      'int' (codes int8, signed), 'fp4' (codes uint8, E2M1 in the low four bits) or 'fp8' (float8_e4m3fn)
    bits:      of a code
    group:     how many consecutive elements of a row share a scale; None: the whole row
    symmetric: integers only: False where a zero point is subtracted before scaling
    scale:     'float' (a floating dtype), 'e4m3' (float8_e4m3fn, divided by a global scale) or 'e8m0' (uint8 exponents)
    """

    kind: str
    bits: int
    group: int | None
    symmetric: bool = True
    scale: str = "float"


@dataclass(frozen=True)
class Weight:
    """A quantized weight.

    codes [out, in]; scale [out, in / group]; zero: int8, shape of scale; global_scale: float32 [1], a divisor of scales
    """

    format: CodeFormat
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]


def float_scale(weight: Weight) -> Tensor:
    """Factors of codes, float32 [out, in / group]."""
    if weight.format.scale == "e8m0":
        return torch.exp2(weight.scale.to(torch.float32) - 127.0)
    scale = weight.scale.to(torch.float32)
    return scale if weight.global_scale is None else scale / weight.global_scale


def dequantize(weight: Weight) -> Tensor:
    """The weight (code - zero) * scale, float32 [out, in]."""
    if weight.format.kind == "fp4":
        lut = torch.tensor(E2M1, device=weight.codes.device)
        values = lut[weight.codes.to(torch.int32)]
    else:
        values = weight.codes.to(torch.float32)
    grouped = values.unflatten(1, (weight.scale.shape[1], -1))
    if weight.zero is not None:
        grouped = grouped - weight.zero.to(torch.float32)[..., None]
    dense: Tensor = grouped * float_scale(weight)[..., None]
    return dense.flatten(1)
