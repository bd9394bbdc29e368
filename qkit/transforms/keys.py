"""Folds scales of keys into the projections: keys / 2^e and queries * 2^e have the same products.

PM-KVQ (arXiv 2505.18610): W_k and b_k are divided by Lambda, W_q and b_q multiplied by it, for every query head of a
group. Both channels of a rotary pair share a scale, else products after rotation would change. Where heads have norms of
their own (Qwen3), scales are folded into the norms' weights, which all heads share. The scales are powers of two
(``qkit.kvcache.scaling``), so nothing is rounded, in any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkit.transforms.state import BlockState


def scale_keys(state: BlockState, exponents: Sequence[Sequence[int]]) -> None:
    """Rewrite queries and keys of a block. exponents: [key heads, head_dim / 2]."""
    keys = state.structure.family.keys
    assert keys is not None
    attention: Any = state.module.get_submodule(keys.attention)
    halves = torch.exp2(torch.tensor(exponents, dtype=torch.float32, device=state.device))
    scale = halves.repeat(1, 2)  # [key heads, head_dim]
    if hasattr(attention, keys.key_norm):
        _multiply(state, getattr(attention, keys.key_norm).weight, 1 / scale[0])
        _multiply(state, getattr(attention, keys.query_norm).weight, scale[0])
        return
    linears = {x.param.removesuffix(".weight"): x for x in state.block.linears}
    heads = getattr(attention, keys.query).out_features // scale.shape[1]
    for name, factor in (
        (keys.key, (1 / scale).flatten()),
        (keys.query, scale.repeat_interleave(heads // len(scale), dim=0).flatten()),
    ):
        linear = linears[f"{keys.attention}.{name}"]
        state.changed[linear.name] = state.weight(linear) * factor[:, None]
        bias = getattr(attention, name).bias
        if bias is not None:
            _multiply(state, bias, factor)
    state.write_back()


def _multiply(state: BlockState, value: Any, factor: Tensor) -> None:
    state.assign(value, value.data.float() * factor)
