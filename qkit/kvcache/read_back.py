"""A cache as engines use it: all keys and values are read back from the cache, those of the new tokens too.

``cache.make_cache`` gives attention the new tokens as they are, so a forward pass over a whole text says nothing of it. With
this cache such a pass computes what vLLM computes, which writes keys and values first and reads all of them back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qkit.kvcache.scales import Scale, layer_count, scales_of

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
Held = (
    Callable[[Tensor, int], Tensor] | None
)  # keys (0) or values (1) as a layer's cache holds them; None: as they come


class ReadBackCache(DynamicCache):  # type: ignore[misc]
    """A cache that gives attention what a narrower one holds of keys and values, by layer."""

    def __init__(self, layers: Sequence[Held]) -> None:
        super().__init__()
        self.held = layers

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, dequantized."""
        hold = self.held[layer]
        pair = (keys, values) if hold is None else (hold(keys, 0), hold(values, 1))
        both: tuple[Tensor, Tensor] = super().update(*pair, layer, *args, **kwargs)
        return both


def fp8_cache(model: Any, kind: str = "fp", by_head: bool = True, cut: bool = False) -> ReadBackCache:
    """The FP8 cache of a model with scales of a kind.

    by_head: whether each head has its own scale where the model has one for it, and not the largest of the layer; cut:
    whether a number goes to the next FP8 number toward zero, and not to the nearest
    """
    scales = scales_of(model, layer_count(model), kind)
    used = scales if by_head else [(_largest(keys), _largest(values)) for keys, values in scales]
    return ReadBackCache([partial(_e4m3_side, pair, cut) for pair in used])


def _largest(scale: Scale) -> Scale:
    return float(scale.max()) if isinstance(scale, Tensor) else scale


def _e4m3_side(scales: tuple[Scale, Scale], cut: bool, x: Tensor, side: int) -> Tensor:
    return held(x, scales[side], cut)


def held(x: Tensor, scale: Scale, cut: bool = False) -> Tensor:
    """What is left of numbers in FP8 (e4m3) with a scale, in their dtype."""
    scale = scale.to(x.device) if isinstance(scale, Tensor) else scale
    scaled = (x.float() / scale).clamp(-_LARGEST, _LARGEST)
    codes = scaled.to(torch.float8_e4m3fn)
    if cut:
        # Codes are a sign and a size: one less is the next number toward zero.
        beyond = codes.float().abs() > scaled.abs()
        codes = (codes.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)
