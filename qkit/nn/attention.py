"""Attention as plain products of matrices, where that is faster on a CPU than torch's fused attention.

One thread of an AVX-512 core, bf16, heads of 32: two rows of 256 tokens with 8 heads, forward and backward in the midst of
learned rounding, 3.6 ms against 9.0 ms (fused blocks are small there, and the backward pass computes the scores again); one
token for each of 128 rows, 8 heads that share 4 caches of 257 tokens, 1.9 ms against 11.2 ms. What the fused one saves, the
scores [batch, heads, queries, keys], is little memory while rows are short.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LONGEST = 512  # keys; of longer rows gradients come as fast from the fused one
FEW = 8  # queries a head: single tokens of heads that share a cache


class PlainAttention(TorchFunctionMode):
    """While it is on, in this thread, attention of short rows in bf16 and of few queries is computed here, on a CPU.
    Everything else goes where it always went."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the function, or ``attend`` in its place."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _suits(*args, **kwargs):
            return attend(*args, **kwargs)
        return func(*args, **kwargs)


def _suits(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
           is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> bool:  # fmt: skip
    if query.ndim != 4 or dropout_p or query.device.type != "cpu" or (is_causal and attn_mask is not None):
        return False
    return query.shape[2] <= FEW or (query.dtype == torch.bfloat16 and key.shape[2] <= LONGEST)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
           is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """What ``torch.nn.functional.scaled_dot_product_attention`` gives of tensors [batch, heads, tokens, head size], without
    dropout. A query that may look at nothing gives zeros. Scores and probabilities are rounded to the dtype of the tensors.
    """
    batch, heads, queries, size = query.shape
    caches, keys = key.shape[1:3]
    # Heads that share keys and values are further queries to them.
    grouped = query.reshape(batch * caches, -1, size)
    bias = blind = None
    if is_causal:
        future = torch.ones(queries, keys, dtype=torch.bool).triu_(1)
        bias = torch.zeros(queries, keys, dtype=query.dtype).masked_fill_(future, -torch.inf)
    elif attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        blind = (bias == -torch.inf).all(-1, keepdim=True)
        bias = bias.masked_fill(blind, 0.0).to(query.dtype)
    factor = size**-0.5 if scale is None else scale
    if bias is None:
        scores = torch.bmm(grouped * factor, key.flatten(0, 1).mT)
    else:
        grouped_bias = bias.expand(batch, heads, queries, keys).reshape(batch * caches, -1, keys)
        scores = torch.baddbmm(grouped_bias, grouped, key.flatten(0, 1).mT, alpha=factor)
    outputs = torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(batch, heads, queries, -1)
    return outputs if blind is None else outputs.masked_fill(blind, 0.0)
