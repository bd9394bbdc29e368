"""Residual channels: input channels that four bits serve badly are quantized twice (ARCQuant, arXiv 2601.07475).

Their rounding error is rounded again and multiplied with the same columns of the weight: the product grows by one column for
each of them, the file hardly grows. The chosen channels are those with the largest error at the group's outputs on sample
tokens. This criterion is ours (the paper compares magnitudes with the layer's largest), as is the equal share in all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.families.blocks import LinearGroup
from qkit.tensor.activations import quantize_activations, static_scale
from qkit.tensor.formats import Format, Scheme
from qkit.transforms.state import BlockState


def residual_channels(fmt: Format | None, columns: int, share: float) -> int:
    """Number of residual channels among ``columns``: whole groups, at least one; 0 for formats without groups."""
    if fmt is None or fmt.group is None:
        return 0
    return max(1, round(share * columns / fmt.group)) * fmt.group


def residual(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """Choose the residual channels of every group, ordered by magnitude, so that outliers share scales."""
    for group in state.block.groups:
        name = group.linears[0].name
        count, acts = state.doubled.get(name, 0), schemes[name].activations if name in schemes else None
        if not count or acts is None:
            continue
        x = state.inputs(group, 0)(state.stats[group.key].sample.float())
        chosen = _errors(x, acts, state, group).argsort(descending=True, stable=True)[:count]
        if len(x):
            chosen = chosen[x.abs().amax(0)[chosen].argsort(descending=True, stable=True)]
        state.residual[group.key] = chosen.to(torch.int32)


def _errors(x: Tensor, fmt: Format, state: BlockState, group: LinearGroup) -> Tensor:
    """Squared output error that rounding of each channel causes, summed over tokens and outputs, float32 [in].

    x: [tokens, in]. Without tokens (an expert that was never chosen), all rounding errors count as equal.
    """
    energy = torch.stack([state.weight(linear).square().sum(0) for linear in group.linears]).sum(0)
    if not len(x):
        return energy
    static = x.new_tensor([static_scale(float(x.abs().max()), fmt)]) if fmt.strategy == "tensor_group" else None
    return (quantize_activations(x, fmt, static) - x).square().sum(0) * energy
