"""Attention of a few new tokens over a packed past, which is unpacked in chunks.

``model.set_attn_implementation("qkit")`` makes a model use it (``attach`` in cache.py does). A cache layer
passes its packed past on with the new keys, and does not unpack it. Attention then reads it in chunks with a running softmax
(Milakov and Gimelshein, arXiv 1805.02867), so its extra memory does not grow with the context. Prefill, and all attention
without a packed past, uses the library's own function.
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
from qkit.kvcache.float4 import Float4
from qkit.kvcache.nested import Nested
from qkit.kvcache.store import WORD, Packed, Plain

NAME = "qkit"
Segment = Packed | Plain | Nested | Float4  # the keys, or the values, of some tokens
CHUNK = 1024  # tokens that are unpacked at a time
QUERIES = 64  # with more new tokens the past is unpacked at once: their scores take more memory


@dataclass(frozen=True)
class PackedPast:
    """Packed keys and values of older tokens.

    segments: in order of tokens; rotations: of the heads of keys and of values, where the cache stores a rotated basis
    owner:    the cache layer, which learns through it that the past was read
    """

    segments: tuple[tuple[Segment, Segment], ...]
    rotations: tuple[Tensor, Tensor] | None = None
    owner: Any = None


def attend(
    query: Tensor,
    past: PackedPast,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    chunk: int = CHUNK,
) -> Tensor:
    """Attention outputs [batch, heads, new, head_dim of values], computed in float32, in query's dtype.

    query: [batch, heads, new, head_dim], heads a multiple of those of keys (grouped queries); keys, values: [batch, kv
    heads, new, ...], which follow the past; mask: bool (True: seen) or added to the scores, [batch or 1, heads or 1, new,
    tokens], or None: causal.
    """
    _, heads, new, _ = query.shape
    kv_heads = keys.shape[1]
    q = query.to(torch.float32).mul(scaling).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # rows of a head: (group, new)
    rotated = q if past.rotations is None else q @ past.rotations[0]
    state = _RunningSoftmax(rotated, values.shape[3], new)
    at = 0
    for k, v in past.segments:
        segment_mask = None if mask is None else mask[..., at : at + k.tokens]
        if (partial := _by_kernel(state.q, query.dtype, k, v, segment_mask, new)) is not None:
            state.fold(*partial)
            at += k.tokens
            continue
        step = chunk if isinstance(k, Plain | Float4) else max(chunk - chunk % k.group, k.group)
        for start in range(0, k.tokens, step):
            end = min(start + step, k.tokens)
            chunk_mask = None if segment_mask is None else segment_mask[..., start:end]
            state.add(k.dequantize(torch.float32, start, end), v.dequantize(torch.float32, start, end), chunk_mask)
        at += k.tokens
    state.q, state.acc = q, state.acc if past.rotations is None else state.acc @ past.rotations[1].T
    if mask is None:
        new_mask = torch.ones(new, new, dtype=torch.bool, device=query.device).tril()[None, None]
    else:
        new_mask = mask[..., at : at + new]
    state.add(keys.to(torch.float32), values.to(torch.float32), new_mask)
    l = torch.where(state.l == 0, 1.0, state.l)  # padding that sees nothing gets zeros
    outputs: Tensor = (state.acc / l[..., None]).unflatten(2, (heads // kv_heads, new)).flatten(1, 2)
    return outputs.to(query.dtype)


def _by_kernel(
    q: Tensor, dtype: torch.dtype, k: Any, v: Any, mask: Tensor | None, new: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(m, l, acc) over a segment from the Triton kernel.

    None where the kernel does not apply: no GPU, more than one new token, or an unsupported width or grouping.
    """
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


class _RunningSoftmax:
    """A running softmax.

    m:   maximum of scores, and l: sum of exponentials, [batch, kv heads, rows]
    acc: weighted sum of values, [.., head_dim of values]
    """

    def __init__(self, q: Tensor, width: int, new: int) -> None:
        self.q, self.new = q, new
        self.m = q.new_full(q.shape[:3], -torch.inf)
        self.l = q.new_zeros(q.shape[:3])
        self.acc = q.new_zeros(*q.shape[:3], width)

    def fold(self, m: Tensor, l: Tensor, acc: Tensor) -> None:
        """Merge the running softmax of other tokens."""
        new_m = torch.maximum(self.m, m)
        base = torch.where(new_m == -torch.inf, 0.0, new_m)
        own_factor, other_factor = (self.m - base).exp(), (m - base).exp()
        self.l = self.l * own_factor + l * other_factor
        self.acc = self.acc * own_factor[..., None] + acc * other_factor[..., None]
        self.m = new_m

    def add(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Add tokens. keys, values: [batch, kv heads, n, ...]; mask: [batch or 1, heads or 1, new, n]."""
        scores = self.q @ keys.transpose(2, 3)
        if mask is not None:
            groups = scores.shape[2] // self.new
            row_mask = mask.expand(-1, scores.shape[1] * groups, -1, -1) if mask.shape[1] == 1 else mask
            row_mask = row_mask.unflatten(1, (scores.shape[1], groups)).flatten(2, 3)
            scores = torch.where(row_mask, scores, -torch.inf) if row_mask.dtype == torch.bool else scores + row_mask
        new_m = torch.maximum(self.m, scores.amax(-1))
        base = torch.where(new_m == -torch.inf, 0.0, new_m)  # nothing seen yet
        factor = (self.m - base).exp()
        p = (scores - base[..., None]).exp_()
        self.l = self.l * factor + p.sum(-1)
        self.acc = self.acc * factor[..., None] + p @ values
        self.m = new_m


def forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention outputs [batch, new, heads, head_dim] and None for weights: the interface of transformers."""
    past: PackedPast | None = getattr(key, "qkit_past", None)
    if past is None:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise Unsupported(
                f"{type(module).__name__} changes keys between cache and attention, so that a packed past is lost: use "
                "set_attn_implementation('sdpa')"
            )
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    if past.owner is not None:
        past.owner.pending = False
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    return attend(query, past, key, value, attention_mask, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
