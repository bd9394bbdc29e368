"""Keys or values as packed codes: the storage of all cache policies.

A tensor [batch, heads, tokens, head_dim] is held as 16-bit words along head_dim, 16 / bits codes a word, the first code in
the highest bits. Three-bit codes are two such tensors: the two low bits, and the high bit sixteen to a word.

A group of numbers shares its least value ``low`` and its range ``span``, both float16; code c stands for
low + c * span / (2^bits - 1). PM-KVQ (arXiv 2505.18610) writes S = span / (2^bits - 1) and Z = low. Keeping the range and not
the step is our choice: halving the width multiplies S by 2^b + 1 and leaves the range as it is, so nothing of a group but
its codes changes, no rounding of S adds up, and float16, which could not hold the step of 16-bit codes, is enough. Both
are rounded outwards, so that every number of the group lies within.

axis 'channel': a group is ``group`` neighbouring channels of a token; axis 'token': ``group`` tokens of a channel (KIVI's
keys, arXiv 2402.02750).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.tensor.formats import FP8_MAX

HALF = {16: 8, 8: 4, 4: 2}  # the width that follows in halving
WORD = 16
LARGEST = 65504.0  # of float16: numbers may be half as large, for a range has to fit too
CHUNK = 4096  # tokens that are unpacked at a time


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words int16 [..., n * bits / 16] of codes int32 [..., n] with 1, 2, 4, 8 or 16 bits."""
    if bits == WORD:
        return codes.to(torch.int16)
    per = WORD // bits
    shifts = torch.arange(per - 1, -1, -1, dtype=torch.int32, device=codes.device) * bits
    words: Tensor = (codes.unflatten(-1, (-1, per)) << shifts).sum(-1, dtype=torch.int32).to(torch.int16)
    return words


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes int32 [..., n] of packed words: the inverse of ``pack``."""
    unsigned = words.to(torch.int32) & 0xFFFF
    if bits == WORD:
        return unsigned
    per = WORD // bits
    shifts = torch.arange(per - 1, -1, -1, dtype=torch.int32, device=words.device) * bits
    return ((unsigned[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def halve_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (int32) with half as many bits (from 16, 8 or 4): round(code / (2^(bits / 2) + 1)), by shifts alone.

    PM-KVQ's equivalent right shift; exact for every code. The 32-bit product may wrap: only bits that no carry of
    it reaches are kept.
    """
    b = bits // 2
    x = codes + (1 << (b - 1))
    return (((x << (2 * b)) - (x << b) + x) >> (3 * b)) & ((1 << b) - 1)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Packed codes of keys or values [batch, heads, tokens, head_dim].

    words: int16 [batch, heads, tokens, head_dim * (2 for 3 bits, else bits) / 16]; high: int16 [batch, heads, tokens,
    head_dim / 16], the high bits of 3-bit codes, else None; low, span: float16 [batch, heads, tokens, head_dim / group]
    or, by token, [batch, heads, tokens / group, head_dim].
    """

    words: Tensor
    low: Tensor
    span: Tensor
    bits: int
    group: int
    axis: str = "channel"
    high: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.words.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.words, self.low, self.span, self.high) if t is not None)

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The codes with a function applied to every tensor (selection of sequences, another device)."""
        high = None if self.high is None else change(self.high)
        return replace(self, words=change(self.words), low=change(self.low), span=change(self.span), high=high)

    def slice(self, start: int, end: int) -> Packed:
        """Tokens start to end; by token both must be multiples of the group."""
        if self.axis == "channel":
            return self.map(lambda t: t[:, :, start:end].clone())
        assert start % self.group == 0 and end % self.group == 0
        cut = replace(self, words=self.words[:, :, start:end].clone())
        at = slice(start // self.group, end // self.group)
        high = None if self.high is None else self.high[:, :, start:end].clone()
        return replace(cut, low=self.low[:, :, at].clone(), span=self.span[:, :, at].clone(), high=high)

    def cat(self, other: Packed) -> Packed:
        """The tokens of both."""
        assert (self.bits, self.group, self.axis) == (other.bits, other.group, other.axis)
        joined = [torch.cat([a, b], dim=2) for a, b in zip(self.tensors, other.tensors, strict=True)]
        high = joined[3] if len(joined) == 4 else None
        return replace(self, words=joined[0], low=joined[1], span=joined[2], high=high)

    def codes(self) -> Tensor:
        """Unpacked codes, int32 [batch, heads, tokens, head_dim]."""
        return self._codes(0, self.tokens)

    def dequantize(self, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Tensor:
        """Values of tokens start to end, [batch, heads, tokens, head_dim], computed in float32.

        With axis token, ``start`` must be a multiple of the group.
        """
        end = self.tokens if end is None else min(end, self.tokens)
        step = CHUNK - CHUNK % self.group
        chunks = [self._dequantized(dtype, at, min(at + step, end)) for at in range(start, end, step)]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)

    def _dequantized(self, dtype: torch.dtype, start: int, end: int) -> Tensor:
        codes = self._codes(start, end).to(torch.float32)
        if self.axis == "channel":
            step, low = (t[:, :, start:end, :, None].to(torch.float32) for t in (self.span, self.low))
            grouped: Tensor = codes.unflatten(3, (-1, self.group))
            return grouped.mul_(step / ((1 << self.bits) - 1)).add_(low).flatten(3).to(dtype)
        first_group, last_group = start // self.group, -(-end // self.group)
        step, low = (t[:, :, first_group:last_group].to(torch.float32) for t in (self.span, self.low))
        step, low = (t.repeat_interleave(self.group, 2)[:, :, : end - start] for t in (step, low))
        return codes.mul_(step / ((1 << self.bits) - 1)).add_(low).to(dtype)

    def _codes(self, start: int, end: int) -> Tensor:
        if self.high is not None:
            return unpack(self.words[:, :, start:end], 2) | unpack(self.high[:, :, start:end], 1) << 2
        return unpack(self.words[:, :, start:end], self.bits)

    def halved(self) -> Packed:
        """The codes with half as many bits and the same groups; nothing is dequantized."""
        bits = HALF[self.bits]
        chunks = [
            pack(halve_codes(self._codes(at, min(at + CHUNK, self.tokens)), self.bits), bits)
            for at in range(0, self.tokens, CHUNK)
        ]
        return replace(self, words=torch.cat(chunks, dim=2), bits=bits)


@dataclass(frozen=True)
class Plain:
    """Unquantized tokens [batch, heads, tokens, head_dim], with the interface of ``Packed``."""

    data: Tensor

    @property
    def tokens(self) -> int:
        return self.data.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.data,)

    def map(self, change: Callable[[Tensor], Tensor]) -> Plain:
        return replace(self, data=change(self.data))

    def slice(self, start: int, end: int) -> Plain:
        return replace(self, data=self.data[:, :, start:end].clone())

    def cat(self, other: Plain) -> Plain:
        return replace(self, data=torch.cat([self.data, other.data], dim=2))

    def dequantize(self, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Tensor:
        return self.data[:, :, start : self.tokens if end is None else end].to(dtype)


@dataclass(frozen=True)
class Float8(Plain):
    """Tokens in float8_e4m3fn, as uint8 (which every device can join and pick from), to be multiplied by ``scale``."""

    scale: float | Tensor = 1.0  # a tensor: float32 [heads, 1, 1]

    @staticmethod
    def of(x: Tensor, scale: float | Tensor) -> Float8:
        """x rounded to nearest; magnitudes above 448 times the scale are clamped."""
        scale = scale.to(x.device) if isinstance(scale, Tensor) else scale
        codes = (x.to(torch.float32) / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return Float8(codes.view(torch.uint8), scale)

    def dequantize(self, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Tensor:
        codes = super().dequantize(torch.uint8, start, end).view(torch.float8_e4m3fn)
        return codes.to(torch.float32).mul_(self.scale).to(dtype)


def quantize(x: Tensor, bits: int, group: int, axis: str = "channel") -> Packed:
    """x [batch, heads, tokens, head_dim] rounded to nearest; magnitudes above 32752 are clamped.

    By channel head_dim must be a multiple of ``group``, by token the number of tokens; head_dim a multiple of
    16 / bits, and of 16 for 3 bits.
    """
    values = x.to(torch.float32).clamp(-LARGEST / 2, LARGEST / 2)
    dim = 3 if axis == "channel" else 2
    grouped = values.unflatten(dim, (-1, group))
    lowest, highest = grouped.amin(dim + 1), grouped.amax(dim + 1)
    low = _outwards(lowest, -1.0)
    span = _outwards(highest - low.to(torch.float32), 1.0)
    factor = torch.where(span == 0, 0.0, ((1 << bits) - 1) / span.to(torch.float32))
    shifted = grouped - low.to(torch.float32).unsqueeze(dim + 1)
    codes = (shifted * factor.unsqueeze(dim + 1)).round_().clamp_(0, (1 << bits) - 1).flatten(dim, dim + 1)
    int_codes = codes.to(torch.int32)
    if bits == 3:
        return Packed(
            words=pack(int_codes & 3, 2),
            low=low,
            span=span,
            bits=bits,
            group=group,
            axis=axis,
            high=pack(int_codes >> 2, 1),
        )
    return Packed(words=pack(int_codes, bits), low=low, span=span, bits=bits, group=group, axis=axis)


def _outwards(x: Tensor, sign: float) -> Tensor:
    """The nearest float16 of x (float32) that is not below it (sign 1), or not above it (sign -1)."""
    nearest = x.to(torch.float16)
    further = (x + sign * (x.abs() * 2.0**-11 + 2.0**-25)).clamp(-LARGEST, LARGEST).to(torch.float16)
    inside = nearest.to(torch.float32) * sign >= x * sign
    return torch.where(inside & nearest.isfinite(), nearest, further)


def narrowed(q: Packed, bits: int) -> Packed:
    """The codes halved down to ``bits`` bits."""
    while q.bits > bits:
        q = q.halved()
    return q


def token_bytes(bits: int, group: int, heads: int, head_dim: int) -> int:
    """Bytes of one token of keys or values of one sequence, grouped by channel."""
    return heads * (head_dim * bits // 8 + 4 * (head_dim // group))
