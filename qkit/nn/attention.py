"""Attention as plain matrix products, for cases where these are faster on a CPU than torch's fused attention.

One thread of an AVX-512 core, bf16, heads of 32: two rows of 256 tokens with 8 heads, forward and backward in the midst of
learned rounding, 3.6 ms against 9.0 ms (fused blocks are small there, and the backward pass computes the scores again); one
token for each of 128 rows, 8 heads that share 4 caches of 257 tokens, 1.9 ms against 11.2 ms. The fused one
saves the memory of the scores [batch, heads, queries, keys], which is small for short rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LONGEST = 512  # keys; for longer rows the fused backward pass is as fast
FEW = 8  # queries of a head: single tokens of heads that share a cache


class PlainAttention(TorchFunctionMode):
    """A mode in which ``attend`` computes attention of short bf16 rows and of few queries, on a CPU and in this thread.

    All other functions run as usual.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Result of the function, or of ``attend`` in its place."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _suits(*args, **kwargs):
            return attend(*args, **kwargs)
        return func(*args, **kwargs)


def _suits(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
           is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> bool:  # fmt: skip
    if query.ndim != 4 or dropout_p or query.is_cuda or (is_causal and attn_mask is not None):
        return False
    return query.shape[2] <= FEW or (query.dtype == torch.bfloat16 and key.shape[2] <= LONGEST)


def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
           is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Attention outputs [batch, heads, queries, head size], as of torch's ``scaled_dot_product_attention`` without dropout.

    query, key, value: [batch, heads, tokens, head size]. A query whose keys are all masked gives zeros. Scores and
    probabilities are rounded to the dtype of the tensors.
    """
    batch, heads, queries, size = query.shape
    caches, keys = key.shape[1:3]
    # Heads that share keys and values are further queries to them.
    grouped = query.reshape(batch * caches, -1, size)
    bias = blind = None
    if is_causal:
        future = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu_(1)
        bias = torch.zeros(queries, keys, dtype=query.dtype, device=query.device).masked_fill_(future, -torch.inf)
    elif attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device).masked_fill_(
                ~attn_mask, -torch.inf
            )
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
