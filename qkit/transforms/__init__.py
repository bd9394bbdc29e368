"""Transforms: rewrites of a block that leave its function as it is and make it easier to quantize.

A transform of stage 'load' changes a block as it is read, before any row runs through it; one of stage 'stats' uses
what was seen at the inputs of its linears. Both work on a ``BlockState``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from qkit.blocks import BlockOutline, Linear, LinearGroup
from qkit.capture import Stats
from qkit.families.outline import Outline
from qkit.inputs import InputTransform


@dataclass
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
    balance: of a vision-language model, by part of the block ('attention', 'mlp'), how much an error at a piece of a picture
             weighs beside one at an answer
    """

    outline: Outline
    block: BlockOutline
    module: nn.Module
    changed: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    doubled: dict[str, int] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Stats] = field(default_factory=dict)
    originals: dict[str, Stats] = field(default_factory=dict)
    distort: bool = False
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    balance: dict[str, float] = field(default_factory=dict)

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
        return value.to(self.outline.dtype).to(next(self.module.parameters()).dtype)

    def write_back(self) -> None:
        """Put the changed weights into the module, rounded to its dtype (to run rows through the block)."""
        for linear in self.block.linears:
            if linear.name in self.changed:
                linear.view(self.module).copy_(self.changed[linear.name])
