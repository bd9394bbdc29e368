"""Searches scales of keys, layer by layer, that equalize their channels before rounding.

PM-KVQ (arXiv 2505.18610, section on calibration with positional interpolation): with m the largest |K| of a pair of
channels that rotary embedding turns together, Lambda = m^alpha; keys are divided by Lambda and queries multiplied by
it, which leaves their products as they are and is folded into the projections (``qkit.transforms.keys``). alpha in
{0, 1/20 .. 1} is searched per layer: the one whose output of attention, with keys and values rounded, is nearest to
the output without.

Our choices: alpha = 0 is among the candidates, so that the search never makes its own measure worse; Lambda is
rounded to a power of two, so that dividing by it is exact in every floating-point format; and its mean exponent is
taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.batches import InputRows, single_rows
from qkit.kvcache.sensitivity import PassThroughCache, forward, rounded

STEPS = 20  # alphas beside 0


class _ScaledKeysCache(PassThroughCache):
    """A cache that returns rounded keys and values; keys are divided by ``scale`` before rounding and multiplied after."""

    def __init__(self, bits: int, group: int) -> None:
        super().__init__()
        self.bits, self.group = bits, group
        self.scale: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.scale is None:
            return keys, values
        scale = self.scale.to(keys)
        return rounded(keys / scale, self.bits, self.group) * scale, rounded(values, self.bits, self.group)


def key_maxima(model: Any, rows: InputRows, stretch: int = 1, shared: bool = False) -> list[Tensor]:
    """For each layer, the largest |K| of every rotary pair (i, i + head_dim / 2) after rotation, float32 [heads, head_dim / 2].

    rows: of a text, read at positions 0, stretch, 2 stretch, .., or with images; shared: one maximum for all heads of a
    layer.
    """
    largest: list[Tensor] = []
    with torch.inference_mode():
        for batch in single_rows(rows):
            cache = PassThroughCache()
            forward(model.base_model, batch, stretch, cache)
            row_largest = [k.abs().amax(dim=(0, 2)).float().unflatten(1, (2, -1)).amax(1) for k, _ in cache.seen]
            largest = (
                [torch.maximum(a, b) for a, b in zip(largest, row_largest, strict=True)] if largest else row_largest
            )
    return [m.amax(0, keepdim=True).expand_as(m) if shared else m for m in largest]


def exponents_of(largest: Tensor, alpha: float) -> Tensor:
    """Rounded log2 of Lambda = largest^alpha minus its mean, int64 in the shape of ``largest``."""
    power = alpha * largest.clamp_min(1e-4).log2()
    return (power - power.mean()).round().long()


def search(
    model: Any, attentions: Sequence[Any], rows: InputRows, bits: int, group: int, stretch: int = 1, shared: bool = False,
    progress: Callable[[], None] | None = None,
) -> list[Tensor]:  # fmt: skip
    """For each layer, exponents of the scales of its keys, int64 [heads, head_dim / 2].

    attentions: the attention module of every layer; bits: the width to search for. Inputs of every layer are those without a
    rounded cache.
    """
    largest = key_maxima(model, rows, stretch, shared)
    candidates = []
    for m in largest:
        distinct = {tuple(e.flatten().tolist()): e for e in (exponents_of(m, i / STEPS) for i in range(STEPS + 1))}
        candidates.append(list(distinct.values()))
    errors = [torch.zeros(len(c), dtype=torch.float64) for c in candidates]
    cache = _ScaledKeysCache(bits, group)

    def listen(layer: int) -> Callable[..., None]:
        def judge(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if cache.scale is not None:
                return
            for i, e in enumerate(candidates[layer]):
                cache.scale = torch.exp2(e.float()).repeat(1, 2)[None, :, None]
                output_scaled = module(*args, **kwargs)[0]
                errors[layer][i] += (output_scaled - output[0]).double().square().sum().cpu()
            cache.scale = None

        return judge

    handles = [a.register_forward_hook(listen(i), with_kwargs=True) for i, a in enumerate(attentions)]
    try:
        with torch.inference_mode():
            for batch in single_rows(rows):
                forward(model.base_model, batch, stretch, cache)
                if progress is not None:
                    progress()
    finally:
        for handle in handles:
            handle.remove()
    return [c[int(e.argmin())].cpu() for c, e in zip(candidates, errors, strict=True)]
