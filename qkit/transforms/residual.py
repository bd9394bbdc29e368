"""Residual channels: input channels that four bits serve badly are quantized twice (ARCQuant, arXiv 2601.07475).

What rounding leaves of them is rounded again and multiplied with their columns of the weight once more: the product grows by
as many columns as there are such channels, the file hardly. Which these are is measured: those whose error, as large as it is
at the group's outputs on sample tokens, is the largest. (The paper compares magnitudes with the layer's largest; that the share
of channels is the same everywhere is our choice, too.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.families.blocks import LinearGroup
from qkit.tensor.activations import quantize_activations, static_scale
from qkit.tensor.formats import Format, Scheme
from qkit.transforms.state import BlockState


def residual_channels(fmt: Format | None, columns: int, share: float) -> int:
    """How many channels of so many: a number of whole groups, at least one of them; none where inputs are not in groups."""
    if fmt is None or fmt.group is None:
        return 0
    return max(1, round(share * columns / fmt.group)) * fmt.group


def residual(state: BlockState, schemes: dict[str, Scheme], seed: int) -> None:
    """Choose the residual channels of every group of the block, the largest first, so that outliers share their scales."""
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
    """By channel, the sum over tokens and outputs of the squares of what its rounding adds, float32 [in]; x: [tokens, in].
    Where no token came by (an expert that was never chosen), as if all errors were the same."""
    energy = torch.stack([state.weight(linear).square().sum(0) for linear in group.linears]).sum(0)
    if not len(x):
        return energy
    static = torch.tensor([static_scale(float(x.abs().max()), fmt)]) if fmt.strategy == "tensor_group" else None
    return (quantize_activations(x, fmt, static) - x).square().sum(0) * energy
