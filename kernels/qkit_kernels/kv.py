"""Attention of one new token over a packed KV cache: a program takes a head of keys and values, with all query heads that
share it as one tile, and a part of the tokens.

Codes are multiplied as they are. A token has one step and one least value for its key and one of each for its value:
  score = step_k (q . code) + low_k sum(q)        out = sum p step_v code + sum p low_v
so the step of the key scales a score, that of the value a probability, and the inner loops only unpack. Programs of one
head store their running softmax (m: maximum, l: sum of exponentials, acc: weighted sum of values); ``decode`` merges them in
order, so the same input gives the same bits.

The layout is that of the cache: int16 words along head_dim, the first code in the highest bits; low and span (the range of
a token's codes) float16. Eight-, four- and two-bit codes; one group a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkit_kernels.decode import narrow, wide
from qkit_kernels.matmul import INTERPRETED

BITS = (2, 4, 8)
PROGRAMS = 4  # for each multiprocessor
LEAST = 256  # tokens of a program
TILE, WARPS, STAGES = 64, 4, 2  # tokens that are unpacked at a time


@dataclass(frozen=True)
class Tokens:
    """Packed keys or values: words int16 [batch, heads, tokens, head_dim bits / 16]; low, span: float16 [batch, heads,
    tokens].
    """

    words: Tensor
    low: Tensor
    span: Tensor
    bits: int

    @property
    def head_dim(self) -> int:
        return self.words.shape[3] * 16 // self.bits


def supported(bits: int, head_dim: int, group: int) -> bool:
    """Whether ``decode`` reads a cache of that kind: one group a head, of 16 to 256 channels and a power of two."""
    return bits in BITS and group == head_dim and 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0


@triton.jit
def _plane(words, BITS: tl.constexpr, P: tl.constexpr):
    """Code P of every word, counted from 0."""
    return (words >> (16 - BITS * (P + 1))) & ((1 << BITS) - 1)


@triton.jit
def _codes(words, BITS: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Codes int32 [N, D] of words int32 [N, D BITS / 16]."""
    if BITS == 8:
        codes = tl.join(_plane(words, 8, 0), _plane(words, 8, 1))
    elif BITS == 4:
        even = tl.join(_plane(words, 4, 0), _plane(words, 4, 2))
        odd = tl.join(_plane(words, 4, 1), _plane(words, 4, 3))
        codes = tl.join(even, odd)
    else:
        a = tl.join(_plane(words, 2, 0), _plane(words, 2, 4))
        b = tl.join(_plane(words, 2, 1), _plane(words, 2, 5))
        c = tl.join(_plane(words, 2, 2), _plane(words, 2, 6))
        d = tl.join(_plane(words, 2, 3), _plane(words, 2, 7))
        codes = tl.join(tl.join(a, c), tl.join(b, d))
    return codes.reshape(N, D)


@triton.jit
def decode_kernel(
    q_ptr, kw_ptr, kl_ptr, ks_ptr, vw_ptr, vl_ptr, vs_ptr, mask_ptr, m_ptr, l_ptr, acc_ptr,
    T, HEADS, SPAN,
    KBITS: tl.constexpr, VBITS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, MASK: tl.constexpr,
    PLAIN: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store m, l float32 [.., ROWS] and acc float32 [.., ROWS, DV] for head ``program 0`` and split ``program 1`` of tokens.

    q: [batch HEADS, G, D], scaled; mask: float32 [batch, T], added to scores. ROWS: of the tile, at least G.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    KW: tl.constexpr = D * KBITS // 16
    VW: tl.constexpr = DV * VBITS // 16
    g, d, dv = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, DV)
    kw, vw, n = tl.arange(0, KW), tl.arange(0, VW), tl.arange(0, N)
    q = tl.load(q_ptr + (head * G + g[:, None]) * D + d[None, :], mask=(g < G)[:, None], other=0.0)
    q_sum = tl.sum(wide(q, PLAIN), 1)
    m = tl.full((ROWS,), -float("inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    low_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DV), tl.float32)
    for start in tl.range(split * SPAN, min(split * SPAN + SPAN, T), N, num_stages=STAGES):
        t = start + n
        live = t < T
        at = head.to(tl.int64) * T + t
        words = tl.load(kw_ptr + at[:, None] * KW + kw[None, :], mask=live[:, None], other=0).to(tl.int32)
        keys = narrow(_codes(words, KBITS, N, D).to(tl.float32), DTYPE, PLAIN)
        if PLAIN:
            scores = tl.dot(wide(q, PLAIN), tl.trans(wide(keys, PLAIN)))
        else:
            scores = tl.dot(q, tl.trans(keys))
        step = tl.load(ks_ptr + at, mask=live, other=0.0).to(tl.float32) * (1.0 / ((1 << KBITS) - 1))
        scores = (
            scores * step[None, :] + q_sum[:, None] * tl.load(kl_ptr + at, mask=live, other=0.0).to(tl.float32)[None, :]
        )
        if MASK:
            scores += tl.load(mask_ptr + (head // HEADS) * T + t, mask=live, other=0.0)[None, :]
        scores = tl.where(live[None, :], scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp(m - base)
        p = tl.exp(scores - base[:, None])
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        low_sum = low_sum * alpha + tl.sum(p * tl.load(vl_ptr + at, mask=live, other=0.0).to(tl.float32)[None, :], 1)
        step = tl.load(vs_ptr + at, mask=live, other=0.0).to(tl.float32) * (1.0 / ((1 << VBITS) - 1))
        p = narrow(p * step[None, :], DTYPE, PLAIN)
        words = tl.load(vw_ptr + at[:, None] * VW + vw[None, :], mask=live[:, None], other=0).to(tl.int32)
        values = narrow(_codes(words, VBITS, N, DV).to(tl.float32), DTYPE, PLAIN)
        if PLAIN:
            acc = acc * alpha[:, None] + tl.dot(wide(p, PLAIN), wide(values, PLAIN))
        else:
            acc = tl.dot(p, values, acc * alpha[:, None])
    out = head * splits + split
    tl.store(m_ptr + out * ROWS + g, m)
    tl.store(l_ptr + out * ROWS + g, l)
    tl.store(acc_ptr + (out * ROWS + g[:, None]) * DV + dv[None, :], acc + low_sum[:, None])


def decode(q: Tensor, keys: Tokens, values: Tokens, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(m, l, acc) of the softmax over all tokens: float32 [batch, heads, group] twice, [batch, heads, group, head_dim].

    q: [batch, heads, group, head_dim], float16 or bfloat16, scaled: the query heads that share a head of keys; mask:
    float32 [batch, tokens], added to scores. The attention output is acc / l. Raises ValueError for a cache that
    ``supported`` refuses.
    """
    batch, heads, group, dim = q.shape
    tokens = keys.words.shape[2]
    for t in (keys, values):
        if not supported(t.bits, t.head_dim, t.head_dim) or t.words.shape[:3] != (batch, heads, tokens):
            raise ValueError(f"{t.bits} bits, words {tuple(t.words.shape)}: expected 2, 4 or 8 bits of all tokens")
    rows = max(16, triton.next_power_of_2(group))
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.device.type == "cuda" else 1
    splits = max(1, min(-(-tokens // LEAST), PROGRAMS * processors // (batch * heads)))
    span = triton.cdiv(triton.cdiv(tokens, splits), TILE) * TILE
    splits = triton.cdiv(tokens, span)
    m, l = (torch.empty(batch, heads, splits, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    acc = torch.empty(batch, heads, splits, rows, values.head_dim, dtype=torch.float32, device=q.device)
    decode_kernel[(batch * heads, splits)](
        q.contiguous(), keys.words, keys.low, keys.span, values.words, values.low, values.span, acc if mask is None else mask,
        m, l, acc, tokens, heads, span,
        KBITS=keys.bits, VBITS=values.bits, D=dim, DV=values.head_dim, G=group, MASK=mask is not None, PLAIN=INTERPRETED,
        ROWS=rows, N=TILE, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return _folded(m[..., :group], l[..., :group], acc[..., :group, :])


def _folded(m: Tensor, l: Tensor, acc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax over all splits, from m, l, acc [batch, heads, splits, group, ..]."""
    m_max = m.amax(2, keepdim=True)
    weight = (m - torch.where(m_max == -torch.inf, 0.0, m_max)).exp()
    return m_max[:, :, 0], (l * weight).sum(2), (acc * weight[..., None]).sum(2)
