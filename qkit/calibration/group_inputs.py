"""The inputs of the groups of a block, from what its modules were called with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.families.blocks import FusedExperts, LinearGroup
from qkit.nn.layers import gated


def group_inputs_of(
    arguments: dict[str, tuple[Any, ...]],
    block: nn.Module,
    fused: tuple[FusedExperts, ...],
    groups: tuple[LinearGroup, ...],
    valid: Tensor | None,
    expert_share: float = 0.0,
) -> dict[str, Tensor]:
    """{group key: inputs [tokens, in] of the valid tokens} from the arguments of the hooked modules.

    expert_share: of all tokens, that a routed expert gets beside those that are sent to it
    """
    result: dict[str, Tensor] = {}
    for group in groups:
        if group.hook and group.hook in arguments:
            x = arguments[group.hook][0]
            x = x.reshape(-1, x.shape[-1])
            if valid is not None:  # rows of another length than the mask (a prompt) do not count
                x = x[valid] if len(valid) == len(x) else x[:0]
            if group.expert is not None and expert_share < 1:
                routed = (arguments[group.hook][1] == group.expert).any(-1).flatten()
                routed |= _spread(len(routed), expert_share, group.expert).to(routed.device)
                x = x[routed if valid is None else routed[valid]]
            result[group.key] = x
        elif group.expert is not None and not group.stack:  # the expert's down projection: its input is computed here
            owner = group.linears[0].owner  # a block may have several sets of experts
            input_group = next(g for g in groups if g.expert == group.expert and g.hook == owner)
            if input_group.key in result:
                whole = replace(input_group.linears[0], rows=None).view(block)  # gate and up, whichever the group has
                layout = next(f for f in fused if f.module == input_group.hook)
                first = nn.functional.linear(result[input_group.key], whole)
                result[group.key] = gated(block.get_submodule(layout.module), layout, group.expert, first)
    return result


def _spread(count: int, share: float, start: int) -> Tensor:
    """bool [count]: a share of the tokens, evenly spread; other starts give other tokens."""
    steps = torch.floor((torch.arange(count + 1, dtype=torch.float64) + start) * share)
    return steps[1:] > steps[:-1]
