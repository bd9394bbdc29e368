"""Marks of tensors that are followed through a run of a skeleton, and what operators make of them.

A mark has the channels of a tensor as a small tensor of their own, to which each operator that moves values is applied, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkit.families.stream import channel_range

STREAM, NORMED, LINEAR = "stream", "normed", "linear"


@dataclass(frozen=True)
class Mark:
    """What is known of a tensor.

    kind:     STREAM (the residual stream), NORMED (what leaves a norm of it), LINEAR (what leaves linears)
    names:    of the linears, whose outputs were added up, or of the norm
    channels: int32, of the tensor's shape: the channel of each value; dimensions along which they repeat have stride 0
    width:    how many channels left the embeddings, the norm or the linears
    exact:    nothing but factors of tokens was multiplied
    head, mixes: as of ``stream.Feed``
    """

    kind: str
    names: frozenset[str]
    channels: Tensor
    width: int
    exact: bool = True
    head: int | None = None
    mixes: bool = True

    @classmethod
    def of(cls, kind: str, name: str, out: Tensor) -> Mark:
        """The mark of a tensor whose last dimension is that of channels. name: '' for none"""
        width = out.shape[-1]
        channels = channel_range(width).expand(out.shape)
        return cls(kind, frozenset([name] if name else []), channels, width)

    @property
    def in_order(self) -> bool:
        """Whether the last dimension is that of channels, all of them."""
        expected = channel_range(self.width)
        return self.channels.shape[-1] == self.width and bool((_once(self.channels) == expected).all())

    @property
    def complete(self) -> bool:
        """Whether all channels are there, in some order."""
        return len(set(_once(self.channels).flatten().tolist())) == self.width

    @property
    def row(self) -> Tensor | None:
        """The channels along the last dimension, where they are the same for all tokens."""
        rows = _once(self.channels).reshape(-1, self.channels.shape[-1])
        return rows[0].clone() if bool((rows == rows[:1]).all()) else None

    def agrees(self, other: Mark) -> bool:
        """Whether values at the same places belong to the same channels."""
        a, b = self.channels, other.channels
        return a.shape == b.shape and bool((_once(a) == _once(b)).all())


def _once(channels: Tensor) -> Tensor:
    """The channels without what repeats: one entry along dimensions of stride 0 before the last."""
    for dim, stride in enumerate(channels.stride()[:-1]):
        channels = channels.narrow(dim, 0, 1) if stride == 0 else channels
    return channels


def moved(
    mark: Mark,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outs: list[Tensor],
    splits: bool,
) -> list[Mark] | None:
    """The marks of what an operator returns that moves values. splits: it may split channels into heads"""
    indexed = any(isinstance(x, Tensor) for x in (*_flat(args), *kwargs.values()))
    if (indexed and mark.row is None) or any(isinstance(x, torch.dtype) for x in args):
        return None
    try:  # what tensors choose is not known; it is tokens, or not every channel
        result = func(mark.channels, *map(_first_entries, args), **{k: _first_entries(v) for k, v in kwargs.items()})
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    found: list[Tensor] = list(result) if isinstance(result, (tuple, list)) else [result]
    if [x.shape for x in outs] != [c.shape for c in found]:
        return None
    width = mark.channels.shape[-1]
    heads = [c.shape[-1] if splits and mark.head is None and c.shape[-1:] < (width,) else mark.head for c in found]
    return [replace(mark, channels=c, head=head) for c, head in zip(found, heads, strict=True)]


def _flat(args: Any) -> list[Any]:
    return [y for x in args for y in (_flat(x) if isinstance(x, (tuple, list)) else [x])]


def _first_entries(value: Any) -> Any:
    """An index, with zeros in place of tensors without values."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_first_entries, value))
    return torch.zeros(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value


def scaled(mark: Mark, factors: list[Tensor], out: Tensor) -> Mark | None:
    """The mark of a product with numbers, with one factor for each token, or with factors of every value."""
    if all(x.numel() == 1 or (x.dim() and x.shape[-1] == 1) for x in factors):
        if out.shape != mark.channels.shape:
            return None
        if all(_same_for_channels(mark.channels, x) for x in factors):
            return mark
        in_heads = mark.head == out.shape[-1]  # one factor for each head
        return replace(mark, exact=False, mixes=mark.mixes and in_heads) if mark.kind == LINEAR else None
    if mark.kind != LINEAR or out.dim() < mark.channels.dim() or out.shape[-1] != mark.channels.shape[-1]:
        return None
    return replace(mark, channels=mark.channels.expand(out.shape), exact=False, mixes=False)


def _same_for_channels(channels: Tensor, factor: Tensor) -> bool:
    """Whether a factor is the same for all channels of a token: they lie along dimensions where it has one value."""
    rows = _once(channels)
    dims = [d - factor.dim() for d, size in enumerate(factor.shape) if size > 1]
    return all(bool((rows == rows.narrow(d, 0, 1)).all()) for d in dims)


def reduced(mark: Mark, dim: Any, out: Tensor) -> Mark | None:
    """The mark of a sum along a dimension that is not that of channels."""
    if not isinstance(dim, int) or dim % mark.channels.dim() == mark.channels.dim() - 1:
        return None
    first = mark.channels.select(dim, 0)
    same = bool((_once(mark.channels) == _once(first.unsqueeze(dim))).all()) and first.shape == out.shape
    return replace(mark, channels=first) if same else None


def attended(mark: Mark, out: Tensor) -> Mark | None:
    """The mark of sums over tokens, weighted by attention. Heads of values may be repeated, each one after another."""
    if mark.kind != LINEAR or mark.channels.dim() < 3 or out.dim() != mark.channels.dim():
        return None
    channels = mark.channels[..., :1, :]
    repeats, rest = divmod(out.shape[-3], channels.shape[-3])
    if rest or not bool((_once(mark.channels) == _once(channels)).all()) or out.shape[-1] != channels.shape[-1]:
        return None
    return replace(mark, channels=channels.repeat_interleave(repeats, -3).expand(out.shape))
