"""Attention of a few new tokens over a packed past, a part of it unpacked at a time.

``model.set_attn_implementation("qkit")`` makes a model use it (``attach`` in cache.py does). Where a cache layer has a packed
past it hands that on with the new keys instead of unpacking it whole; here it is read in chunks with a running softmax
(Milakov and Gimelshein, arXiv 1805.02867), so that what attention takes beside the cache does not grow with the
context. Prefill, and everything without a packed past, is the library's own attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qkit.errors import Unsupported
from qkit.kvcache.nested import Nested
from qkit.kvcache.store import WORD, Packed, Plain

NAME = "qkit"
CHUNK = 1024  # tokens that are unpacked at a time
QUERIES = 64  # more new tokens than this see the past unpacked whole: their scores are larger than it


@dataclass(frozen=True)
class Past:
    """What keys and values of older tokens are kept in: segments in order; rotations: of the heads of keys and of values where
    the store has its own basis."""

    segments: tuple[tuple[Packed | Plain | Nested, Packed | Plain | Nested], ...]
    rotations: tuple[Tensor, Tensor] | None = None
    owner: Any = None  # the cache layer, which is told that the past was read


def attend(
    query: Tensor, past: Past, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, chunk: int = CHUNK
) -> Tensor:
    """[batch, heads, new, head_dim of values] in query's dtype; computed in float32.

    query: [batch, heads, new, head_dim], heads a multiple of those of keys (grouped queries); keys, values: [batch, kv
    heads, new, ...], which follow the past; mask: bool (True: seen) or added to the scores, [batch or 1, heads or 1, new,
    tokens], or None: causal.
    """
    _, heads, new, _ = query.shape
    kv_heads = keys.shape[1]
    q = query.to(torch.float32).mul(scaling).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # rows of a head: (group, new)
    turned = q if past.rotations is None else q @ past.rotations[0]
    state = _State(turned, values.shape[3], new)
    at = 0
    for k, v in past.segments:
        seen = None if mask is None else mask[..., at : at + k.tokens]
        if (found := _by_kernel(state.q, query.dtype, k, v, seen, new)) is not None:
            state.fold(*found)
            at += k.tokens
            continue
        step = chunk if isinstance(k, Plain) else max(chunk - chunk % k.group, k.group)
        for start in range(0, k.tokens, step):
            end = min(start + step, k.tokens)
            part = None if seen is None else seen[..., start:end]
            state.add(k.dequantize(torch.float32, start, end), v.dequantize(torch.float32, start, end), part)
        at += k.tokens
    state.q, state.sum = q, state.sum if past.rotations is None else state.sum @ past.rotations[1].T
    if mask is None:
        last = torch.ones(new, new, dtype=torch.bool, device=query.device).tril()[None, None]
    else:
        last = mask[..., at : at + new]
    state.add(keys.to(torch.float32), values.to(torch.float32), last)
    total = torch.where(state.total == 0, 1.0, state.total)  # padding that sees nothing gets zeros
    done: Tensor = (state.sum / total[..., None]).unflatten(2, (heads // kv_heads, new)).flatten(1, 2)
    return done.to(query.dtype)


def _by_kernel(
    q: Tensor, dtype: torch.dtype, k: Any, v: Any, mask: Tensor | None, new: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(most, total, sum) over a segment by the Triton kernel; None where it does not serve: not on a GPU, more than one new
    token, a width or a grouping that it does not read."""
    if new > 1 or not _on_gpu(q) or dtype == torch.float32 or not (isinstance(k, Packed) and isinstance(v, Packed)):
        return None
    from qkit_kernels import kv  # brings Triton

    if not all(
        s.axis == "channel" and kv.supported(s.bits, s.words.shape[3] * WORD // s.bits, s.group) for s in (k, v)
    ):
        return None
    if mask is not None:
        if mask.shape[1] > 1:
            return None
        added = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        mask = added[:, 0, 0].to(torch.float32).expand(len(q), -1).contiguous()
    keys, values = (kv.Tokens(s.words, s.low[..., 0], s.span[..., 0], s.bits) for s in (k, v))
    with torch.cuda.device_of(q):  # Triton launches on the current one
        return kv.decode(q.to(dtype), keys, values, mask)


def _on_gpu(t: Tensor) -> bool:
    return t.device.type == "cuda"


class _State:
    """A running softmax. most, total: [batch, kv heads, rows]; sum: [.., head_dim of values]."""

    def __init__(self, q: Tensor, width: int, new: int) -> None:
        self.q, self.new = q, new
        self.most = q.new_full(q.shape[:3], -torch.inf)
        self.total = q.new_zeros(q.shape[:3])
        self.sum = q.new_zeros(*q.shape[:3], width)

    def fold(self, most: Tensor, total: Tensor, sums: Tensor) -> None:
        """Another running softmax, of other tokens."""
        highest = torch.maximum(self.most, most)
        base = torch.where(highest == -torch.inf, 0.0, highest)
        mine, theirs = (self.most - base).exp(), (most - base).exp()
        self.total = self.total * mine + total * theirs
        self.sum = self.sum * mine[..., None] + sums * theirs[..., None]
        self.most = highest

    def add(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Tokens [batch, kv heads, n, ...]; mask [batch or 1, heads or 1, new, n]."""
        scores = self.q @ keys.transpose(2, 3)
        if mask is not None:
            groups = scores.shape[2] // self.new
            wide = mask.expand(-1, scores.shape[1] * groups, -1, -1) if mask.shape[1] == 1 else mask
            wide = wide.unflatten(1, (scores.shape[1], groups)).flatten(2, 3)
            scores = torch.where(wide, scores, -torch.inf) if wide.dtype == torch.bool else scores + wide
        most = torch.maximum(self.most, scores.amax(-1))
        base = torch.where(most == -torch.inf, 0.0, most)  # nothing seen yet
        shrink = (self.most - base).exp()
        p = (scores - base[..., None]).exp_()
        self.total = self.total * shrink + p.sum(-1)
        self.sum = self.sum * shrink[..., None] + p @ values
        self.most = most


def forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' interface: [batch, new, heads, head_dim], and no weights."""
    past: Past | None = getattr(key, "qkit_past", None)
    if past is None:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise Unsupported(
                f"{type(module).__name__} changes keys between cache and attention, so that a packed past is lost: use "
                "set_attn_implementation('sdpa')"
            )
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    if past.owner is not None:
        past.owner.pending = False
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    return attend(query, past, key, value, attention_mask, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
