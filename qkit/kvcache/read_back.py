"""An FP8 cache as engines use it: all keys and values are read back from the cache, those of the new tokens too.

``cache.make_cache`` gives attention the new tokens as they are, so a forward pass over a whole text says nothing of it. With
this cache such a pass computes what vLLM computes, which writes keys and values first and reads all of them back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qkit.kvcache.cache import CacheShape
from qkit.kvcache.scales import scales_of

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class ReadBackCache(DynamicCache):  # type: ignore[misc]
    """A cache that gives attention what FP8 holds of keys and values.

    model: one with scales; cut: whether a number goes to the next FP8 number toward zero, and not to the nearest
    """

    def __init__(self, model: Any, cut: bool = False) -> None:
        super().__init__()
        self.scales, self.cut = scales_of(model, CacheShape.of(model).layers), cut

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, dequantized."""
        pair = [held(x, s, self.cut) for x, s in zip((keys, values), self.scales[layer], strict=True)]
        both: tuple[Tensor, Tensor] = super().update(*pair, layer, *args, **kwargs)
        return both


def held(x: Tensor, scale: float, cut: bool = False) -> Tensor:
    """What is left of numbers in FP8 (e4m3) with a scale, in their dtype."""
    scaled = (x.float() / scale).clamp(-_LARGEST, _LARGEST)
    codes = scaled.to(torch.float8_e4m3fn)
    if cut:
        # Codes are a sign and a size: one less is the next number toward zero.
        beyond = codes.float().abs() > scaled.abs()
        codes = (codes.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)
