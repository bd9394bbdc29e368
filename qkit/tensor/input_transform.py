"""A run-time transform of the inputs of a linear, applied before they are quantized; its inverse is folded into the weight.

Channels are multiplied by a scale, and blocks of channels by a Hadamard matrix, which is symmetric and its own inverse. x and W
become x' and W' with x' W'^T = x W^T, so only rounding changes. The scale is SmoothQuant's, where it cannot be folded into a
layer before the linear (in a diffusion transformer, all blocks share the modulation of inputs). 6Bit-Diffusion (arXiv
2603.18742, section 4.1) uses Hadamard blocks of 128; the two together are ViDiT-Q's static-dynamic balancing (arXiv
2406.02540).

Residual channels (ARCQuant, arXiv 2601.07475) come first, and the others follow in their order. The rounding error of the
former is rounded once more and multiplied with the same columns of the weight. [Q(x) | Q(r)] times [W | W's first columns]
is one product of plain blocks, and no value of the weight is stored twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

WIDEST, NARROWEST = 128, 16
SCALE = "pre_quant_scale"  # the scale's name in parts and checkpoints
RESIDUAL = "input_residual"  # the name of the residual channels there


def hadamard_block(columns: int) -> int:
    """The widest block, a power of two from NARROWEST to WIDEST, that divides ``columns`` channels; 0 where there is none."""
    block = min(WIDEST, columns & -columns)
    return block if block >= NARROWEST else 0


@lru_cache(maxsize=8)
def hadamard_matrix(block: int, device: torch.device) -> Tensor:
    """The normalized Hadamard matrix in Sylvester's order, float32 [block, block]."""
    with torch.inference_mode(False):  # it is kept, and may be needed for gradients later
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < block:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        scaled: Tensor = (h / block**0.5).to(torch.float32).to(device)
    return scaled


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [.., channels] with every block of channels transformed, in x's dtype; x itself for block 0."""
    if not block:
        return x
    wide: Tensor = x.float().unflatten(-1, (-1, block)) @ hadamard_matrix(block, x.device)
    flat: Tensor = wide.flatten(-2).to(x.dtype)
    return flat


@dataclass(frozen=True)
class InputTransform:
    """A transform of the inputs of a linear: scale, Hadamard transform, reordering.

    scale:    [in], factors of channels (None: none)
    block:    of the Hadamard transform (0: none)
    order:    int64 [in], the order of channels after that (None: unchanged)
    residual: number of residual channels, which come first
    """

    scale: Tensor | None = None
    block: int = 0
    order: Tensor | None = None
    residual: int = 0

    @staticmethod
    def of(scale: Tensor | None, block: int, residual_channels: Tensor | None, columns: int) -> InputTransform:
        """The transform with residual channels (int32 indices, None: none) among ``columns`` channels."""
        if residual_channels is None:
            return InputTransform(scale, block)
        rest = torch.ones(columns, dtype=torch.bool, device=residual_channels.device)
        rest[residual_channels.long()] = False
        return InputTransform(
            scale, block, torch.cat([residual_channels.long(), rest.nonzero()[:, 0]]), len(residual_channels)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Transformed inputs [.., in], in the dtype of x."""
        return self._residual_first(hadamard(x if self.scale is None else (x * self.scale).to(x.dtype), self.block))

    def back(self, x: Tensor) -> Tensor:
        """The inverse transform of inputs [.., in]."""
        y = hadamard(self._restored_order(x), self.block)
        return y if self.scale is None else (y / self.scale).to(x.dtype)

    def weight(self, w: Tensor) -> Tensor:
        """The weight [out, in] for transformed inputs, float32."""
        return self._residual_first(hadamard(w if self.scale is None else w / self.scale.float(), self.block))

    def weight_back(self, w: Tensor) -> Tensor:
        """The weight [out, in] for untransformed inputs, float32: the inverse of ``weight``."""
        y = hadamard(self._restored_order(w), self.block)
        return y if self.scale is None else y * self.scale.float()

    def weight_slope(self, slope: Tensor) -> Tensor:
        """The gradient with respect to ``weight(w)`` from that with respect to w, float32 [out, in]."""
        return self._residual_first(hadamard(slope if self.scale is None else slope * self.scale.float(), self.block))

    def to(self, device: torch.device) -> InputTransform:
        """The transform on another device."""
        scale, order = (None if t is None else t.to(device) for t in (self.scale, self.order))
        return InputTransform(scale, self.block, order, self.residual)

    def _residual_first(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(-1, self.order)

    def _restored_order(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(-1, self._back)

    @cached_property
    def _back(self) -> Tensor:
        """Position of each channel in ``order``, int64 [in]."""
        assert self.order is not None
        return self.order.argsort()


PLAIN = InputTransform()
