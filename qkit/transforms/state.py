"""The state of a block while it is transformed and solved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.statistics import Stats
from qkit.families.blocks import BlockStructure, Linear, LinearGroup
from qkit.families.structure import ModelStructure
from qkit.tensor.input_transform import InputTransform


@dataclass(kw_only=True)
class BlockState:
    """A block while it is transformed and solved.

    module:  the materialized block; transforms change its norms and biases in place
    changed: {linear name: float32 [out, in]} of weights that a transform rewrote; they are quantized from
             float32, and not rounded to the model's dtype before
    scales:  {group key: [in] in the checkpoint's dtype}, run-time factors of inputs; the module's weights remain those
             for unscaled inputs
    doubled: {linear name: number of residual channels}; residual: {group key: these channels, int32}
    stats:   {group key: statistics of its inputs}; originals: the same in the original model, where a transform needs it
    divided: {group key: float32 [in]}, what the group's source divides its inputs by, against the original model
    distort: ``originals`` is used for reference outputs only
    original_values: {need: value for this block}, from passes of the original model
    unproved: keys of groups whose source a scale is not folded into: it changed what the block returns
    exact: nothing is rounded to the checkpoint's dtype, for a proof
    """

    structure: ModelStructure
    block: BlockStructure
    module: nn.Module
    changed: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    doubled: dict[str, int] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Stats] = field(default_factory=dict)
    originals: dict[str, Stats] = field(default_factory=dict)
    divided: dict[str, Tensor] = field(default_factory=dict)
    distort: bool = False
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    original_values: dict[str, Any] = field(default_factory=dict)
    unproved: set[str] = field(default_factory=set)
    exact: bool = False

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return next(self.module.parameters()).device

    def weight(self, linear: Linear) -> Tensor:
        """The weight after the transforms so far, float32 [out, in]. Callers must not write to it."""
        changed = self.changed.get(linear.name)
        return linear.view(self.module).float() if changed is None else changed

    def inputs(self, group: LinearGroup, rotation: int) -> InputTransform:
        """The run-time transform of the group's inputs."""
        columns = group.linears[0].shape[1]
        return InputTransform.of(self.scales.get(group.key), rotation, self.residual.get(group.key), columns)

    def assign(self, parameter: Any, value: Tensor) -> None:
        """Give a norm's weight or a bias a value as the file will hold it: rounded to the checkpoint's dtype."""
        rounded = value if self.exact else value.to(self.structure.dtype)
        parameter.data = rounded.to(parameter.dtype)

    def write_back(self) -> None:
        """Write the changed weights into the module, rounded to its dtype, so that rows can run through the block."""
        for linear in self.block.linears:
            if linear.name in self.changed:
                linear.view(self.module).copy_(self.changed[linear.name])
