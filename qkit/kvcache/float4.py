"""Keys or values in NVFP4: 4-bit floats (E2M1), an FP8 scale for 16 channels of a token, and one scale of these scales.

The scale of scales is measured beforehand and stands in the checkpoint as compressed-tensors 0.20 writes it, a multiplier:
2688 / the largest magnitude. Numbers beyond that magnitude saturate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.tensor.formats import ACTIVATION_FORMATS
from qkit.tensor.packing import pack_nibbles, unpack_nibbles
from qkit.tensor.params import Params
from qkit.tensor.qtensor import QTensor, dequantize, params_from_range, quantize

NVFP4 = ACTIVATION_FORMATS["nvfp4_dynamic"]
GROUP = NVFP4.group or 16


@dataclass(frozen=True, kw_only=True)
class Float4:
    """words: uint8 [batch, heads, tokens, head_dim / 2]; steps: the bytes of FP8 scales [batch, heads, tokens, head_dim / 16];
    multiplier: float32 [1]. It has the interface of ``store.Packed``."""

    words: Tensor
    steps: Tensor
    multiplier: Tensor

    @staticmethod
    def of(x: Tensor, multiplier: Tensor) -> Float4:
        """x [batch, heads, tokens, head_dim] rounded to nearest."""
        rows = x.to(torch.float32).flatten(0, 2)
        amax = rows.unflatten(1, (-1, GROUP)).abs().amax(2)
        multiplier = multiplier.to(x.device, torch.float32)
        params = params_from_range(-amax, amax, NVFP4, torch.float32, multiplier)
        codes = pack_nibbles(quantize(rows, params, NVFP4).codes)
        shape = x.shape[:3]
        return Float4(
            words=codes.unflatten(0, shape),
            steps=params.scale.view(torch.uint8).unflatten(0, shape),
            multiplier=multiplier,
        )

    @property
    def tokens(self) -> int:
        return self.words.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.words, self.steps

    def map(self, change: Callable[[Tensor], Tensor]) -> Float4:
        return replace(self, words=change(self.words), steps=change(self.steps))

    def slice(self, start: int, end: int) -> Float4:
        return self.map(lambda t: t[:, :, start:end].clone())

    def cat(self, other: Float4) -> Float4:
        pairs = zip(self.tensors, other.tensors, strict=True)
        words, steps = (torch.cat(pair, dim=2) for pair in pairs)
        return replace(self, words=words, steps=steps)

    def dequantize(self, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Tensor:
        """Values of tokens start to end, [batch, heads, tokens, head_dim], computed in float32."""
        words, steps = (t[:, :, start:end].contiguous() for t in self.tensors)
        scale = steps.flatten(0, 2).view(torch.float8_e4m3fn)
        codes = unpack_nibbles(words.flatten(0, 2))
        params = Params(scale, None, self.multiplier.to(scale.device))
        values: Tensor = dequantize(QTensor(codes, params, NVFP4)).unflatten(0, words.shape[:3])
        return values.to(dtype)
