"""What is done to the inputs of a linear at run time, before they are quantized, and beforehand undone in its weight.

Channels are multiplied by a scale (SmoothQuant's, where nothing before the linear can take it: in a diffusion transformer
inputs are modulated by what all blocks share), and blocks of channels by a Hadamard matrix, which is symmetric and its own
inverse. x and W become x' and W' with x' W'^T = x W^T, so that nothing changes but what is rounded. 6Bit-Diffusion (arXiv
2603.18742, section 4.1) takes Hadamard blocks of 128; the two together are ViDiT-Q's static-dynamic balancing (arXiv
2406.02540).

Residual channels (ARCQuant, arXiv 2601.07475) come first, and the others behind them in their order: what rounding leaves of
the former is rounded once more and multiplied with the same columns of the weight. [Q(x) | Q(r)] times [W | W's first columns]
is one product of plain blocks, and no value of the weight is stored twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

WIDEST, NARROWEST = 128, 16
SCALE = "pre_quant_scale"  # the scale's name in parts and checkpoints
RESIDUAL = "input_residual"  # that of the residual channels


def hadamard_block(columns: int) -> int:
    """The widest block, a power of two up to WIDEST, that divides so many channels; 0 where only narrow ones do."""
    block = min(WIDEST, columns & -columns)
    return block if block >= NARROWEST else 0


@lru_cache(maxsize=8)
def hadamard_matrix(block: int, device: torch.device) -> Tensor:
    """The normalized Hadamard matrix in Sylvester's order, float32."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    scaled: Tensor = (h / block**0.5).to(torch.float32).to(device)
    return scaled


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [.., channels] with every block of channels transformed, in its dtype; as it is for block 0."""
    if not block:
        return x
    wide: Tensor = x.float().unflatten(-1, (-1, block)) @ hadamard_matrix(block, x.device)
    flat: Tensor = wide.flatten(-2).to(x.dtype)
    return flat


@dataclass(frozen=True)
class InputTransform:
    """scale: [in], what channels are multiplied by (None: nothing); block: of the Hadamard transform after it (0: none);
    order: int64 [in], which channel comes where after that; residual: how many of the first are residual channels."""

    scale: Tensor | None = None
    block: int = 0
    order: Tensor | None = None
    residual: int = 0

    @staticmethod
    def of(scale: Tensor | None, block: int, residual_channels: Tensor | None, columns: int) -> InputTransform:
        """first: int32, the residual channels, of so many channels; None: there are none."""
        if residual_channels is None:
            return InputTransform(scale, block)
        rest = torch.ones(columns, dtype=torch.bool)
        rest[residual_channels.long()] = False
        return InputTransform(
            scale, block, torch.cat([residual_channels.long(), rest.nonzero()[:, 0]]), len(residual_channels)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs [.., in], in their dtype."""
        return self._residual_first(hadamard(x if self.scale is None else (x * self.scale).to(x.dtype), self.block))

    def back(self, x: Tensor) -> Tensor:
        """The inverse."""
        y = hadamard(self._restored_order(x), self.block)
        return y if self.scale is None else (y / self.scale).to(x.dtype)

    def weight(self, w: Tensor) -> Tensor:
        """The weight [out, in] for transformed inputs, float32."""
        return self._residual_first(hadamard(w if self.scale is None else w / self.scale.float(), self.block))

    def weight_back(self, w: Tensor) -> Tensor:
        """The weight for inputs as they were."""
        y = hadamard(self._restored_order(w), self.block)
        return y if self.scale is None else y * self.scale.float()

    def weight_slope(self, slope: Tensor) -> Tensor:
        """The gradient by ``weight(w)``, from that by w, float32 [out, in]."""
        return self._residual_first(hadamard(slope if self.scale is None else slope * self.scale.float(), self.block))

    def to(self, device: torch.device) -> InputTransform:
        """The same on another device."""
        scale, order = (None if t is None else t.to(device) for t in (self.scale, self.order))
        return InputTransform(scale, self.block, order, self.residual)

    def _residual_first(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(-1, self.order)

    def _restored_order(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(-1, self._back)

    @cached_property
    def _back(self) -> Tensor:
        """int64 [in]: where each channel is."""
        assert self.order is not None
        return self.order.argsort()


PLAIN = InputTransform()
