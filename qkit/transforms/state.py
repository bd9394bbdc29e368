"""A block on its way through transforms and solver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qkit.calibration.statistics import Stats
from qkit.families.blocks import BlockStructure, Linear, LinearGroup
from qkit.families.structure import ModelStructure
from qkit.tensor.input_transform import InputTransform


@dataclass(kw_only=True)
class BlockState:
    """A block on its way through transforms and solver.

    module:  the materialized block; transforms change its norms and biases in place
    changed: weights [out, in] in float32 that a transform rewrote, by linear name: they are quantized from
             float32, never rounded to the model's dtype in between
    scales:  by group, what its inputs are multiplied by at run time, [in] in the checkpoint's dtype; the module's weights stay
             those for inputs as they are
    doubled: by linear, how many residual channels it is to have; residual: by group, which these are, int32
    originals: what would be seen if nothing before had been quantized, where a transform asks for it; distort: for what
             outputs are to be, and not for what they are made from
    original_values: by need, what a pass of the original model gave for this block
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
    distort: bool = False
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    original_values: dict[str, Any] = field(default_factory=dict)

    def weight(self, linear: Linear) -> Tensor:
        """float32 [out, in], as it stands after the transforms so far; not to be written to."""
        changed = self.changed.get(linear.name)
        return linear.view(self.module).float() if changed is None else changed

    def inputs(self, group: LinearGroup, rotation: int) -> InputTransform:
        """What is done at run time to the inputs of the group's linears."""
        columns = group.linears[0].shape[1]
        return InputTransform.of(self.scales.get(group.key), rotation, self.residual.get(group.key), columns)

    def rounded(self, value: Tensor) -> Tensor:
        """A norm's weight or a bias as the file will hold it: rounded to the checkpoint's dtype, in that of the module."""
        return value.to(self.structure.dtype).to(next(self.module.parameters()).dtype)

    def write_back(self) -> None:
        """Put the changed weights into the module, rounded to its dtype (to run rows through the block)."""
        for linear in self.block.linears:
            if linear.name in self.changed:
                linear.view(self.module).copy_(self.changed[linear.name])
