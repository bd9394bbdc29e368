"""Keys or values as 4-bit codes plus 4-bit codes of their rounding error, which can be read at 4 or at 8 bits.

QuantSpec (arXiv 2502.10424): u = round((x - m) / s) in 0..15 and l = round((x - (u s + m)) / (s / 16)) in -8..7; the draft
reads u s + m, half of the bytes; the target reads u s + m + l s / 16. So the codes of l are a separate tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.kvcache.store import CHUNK, Packed, pack, quantize, unpack


@dataclass(frozen=True)
class Nested:
    """Codes at two levels. upper: 4-bit codes; lower: int16 [batch, heads, tokens, head_dim / 4], l + 8 of four
    channels a word.
    """

    upper: Packed
    lower: Tensor

    @property
    def tokens(self) -> int:
        return self.upper.tokens

    @property
    def group(self) -> int:
        return self.upper.group

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.upper.tensors, self.lower)

    def map(self, change: Callable[[Tensor], Tensor]) -> Nested:
        return Nested(self.upper.map(change), change(self.lower))

    def slice(self, start: int, end: int) -> Nested:
        return Nested(self.upper.slice(start, end), self.lower[:, :, start:end].clone())

    def cat(self, other: Nested) -> Nested:
        return Nested(self.upper.cat(other.upper), torch.cat([self.lower, other.lower], dim=2))

    def dequantize(self, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Tensor:
        """Values of tokens start to end at 8 bits, [batch, heads, tokens, head_dim].

        With axis token, ``start`` must be a multiple of the group.
        """
        end = self.tokens if end is None else min(end, self.tokens)
        step = CHUNK - CHUNK % self.group
        parts = [self._part(start_, min(start_ + step, end)).to(dtype) for start_ in range(start, end, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _part(self, start: int, end: int) -> Tensor:
        fine = unpack(self.lower[:, :, start:end], 4).to(torch.float32) - 8
        return self.upper.dequantize(torch.float32, start, end) + fine * (_steps(self.upper, start, end) / 16)


def _steps(upper: Packed, start: int = 0, end: int | None = None) -> Tensor:
    """Step of each code, float32 [batch, heads, tokens, head_dim]: the values of codes 1 above a minimum of 0."""
    ones = replace(upper, words=torch.full_like(upper.words, 0x1111), low=torch.zeros_like(upper.low))
    return ones.dequantize(torch.float32, start, end)


def nested(x: Tensor, group: int, axis: str = "channel") -> Nested:
    """x [batch, heads, tokens, head_dim], quantized; arguments as for ``store.quantize``."""
    upper = quantize(x, 4, group, axis)
    steps = _steps(upper)
    remainder = (x.to(torch.float32) - upper.dequantize(torch.float32)) * torch.where(steps == 0, 0.0, 16 / steps)
    return Nested(upper, pack((remainder.round().clamp_(-8, 7) + 8).to(torch.int32), 4))
