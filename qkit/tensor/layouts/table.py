"""The layouts by name, as the option ``--export`` has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkit.tensor.formats import Format
from qkit.tensor.layouts import awq, gptq, mlx, modelopt
from qkit.tensor.qtensor import QTensor

Spec = tuple[torch.dtype, tuple[int, ...]]
Pair = tuple[Format, Format | None]
HALVES = (torch.float16, torch.bfloat16)  # scales of GPTQ and AWQ


@dataclass(frozen=True)
class Layout:
    """One layout.

    title:   its name in messages
    refusal: (weights, activations, [out, in]) -> why it has no place for such a linear, or None
    specs:   (weights, activations, [out, in], dtype of scales) -> the tensors of a linear
    write:   (weight, activations, scale of the inputs, dtype of scales) -> these tensors
    config:  ({linear: formats}, skipped linears, heads, with scales of a KV cache) -> ``quantization_config``
    files:   from this, {name: content} of what lies beside config.json
    keys:    from config.json with it, what else that has
    mixes:   what may differ between linears of one file; nothing: all have one format
    cache:   whether it has a place for the scales of an FP8 KV cache
    ends:    whether embeddings may be quantized
    """

    title: str
    refusal: Callable[[Format, Format | None, tuple[int, int]], str | None]
    specs: Callable[[Format, Format | None, tuple[int, int], torch.dtype], dict[str, Spec]]
    write: Callable[[QTensor, Format | None, Tensor | None, torch.dtype], dict[str, Tensor]]
    config: Callable[[Mapping[str, Pair], Sequence[str], Sequence[str], bool], dict[str, Any]]
    files: Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]]
    mixes: bool
    cache: bool
    ends: bool = False
    keys: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}


LAYOUTS: dict[str, Layout] = {
    "gptq": Layout("GPTQ", gptq.refusal, gptq.specs, gptq.write, gptq.config, gptq.files, True, False),
    "awq": Layout("AWQ", awq.refusal, awq.specs, awq.write, awq.config, awq.files, False, False),
    "modelopt": Layout(
        "ModelOpt", modelopt.refusal, modelopt.specs, modelopt.write, modelopt.config, modelopt.files, True, True
    ),
    "mlx": Layout(
        "MLX", mlx.refusal, mlx.specs, mlx.write, mlx.config, lambda quantization: {}, True, False, True, mlx.keys
    ),
}


def refusal(
    layout: Layout, pairs: Mapping[str, Pair], shapes: Mapping[str, tuple[int, int]], ends: Sequence[str]
) -> str | None:
    """Why a layout has no place for these linears, the first of them named; None where it has.

    ends: embeddings among them
    """
    for name, (weights, activations) in pairs.items():
        reason = layout.refusal(weights, activations, shapes[name])
        if name in ends and not layout.ends:
            reason = f"it is an embedding, and {layout.title} quantizes linears only"
        if reason is not None:
            return f"{name}: {reason}"
    kinds: dict[tuple[int, int | None], str] = {}
    for name, (weights, _) in pairs.items():
        kinds.setdefault((weights.bits, weights.group), name)
    if not layout.mixes and len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        sizes = " and ".join(f"group {g}" if g else "one scale per channel" for g in (one[1], other[1]))
        return f"{second}: {layout.title} has one format for the whole model, and {first} and this one have {sizes}"
    return None


def scale_dtype(layout: str, weights: Format, stored: torch.dtype, model: torch.dtype) -> torch.dtype:
    """The dtype in which a layout keeps scales that are stored in another: GPTQ and AWQ have 16 bits, and MLX has 32 where
    there are zero points."""
    if layout == "mlx":
        return mlx.scale_dtype(weights, stored)
    if layout not in ("gptq", "awq") or stored in HALVES:
        return stored
    return model if model in HALVES else torch.float16


def lost_scales(q: QTensor, dtype: torch.dtype) -> int:
    """How many scales of a weight would change if they were stored in ``dtype``."""
    scale = q.params.scale
    return int((scale.to(dtype).to(torch.float32) != scale.to(torch.float32)).sum())


def stores_zeros(layout: str, pairs: Mapping[str, Pair]) -> bool:
    """Whether a file has zero points for all of its linears, those that need none included: GPTQ says so once for all."""
    return layout == "gptq" and any(not weights.symmetric for weights, _ in pairs.values())


def with_zeros(q: QTensor) -> QTensor:
    """The same weight, with a zero point of 0 for each scale where it has none."""
    if q.params.zero is not None:
        return q
    return replace(q, params=replace(q.params, zero=torch.zeros_like(q.params.scale, dtype=torch.int8)))


_CACHE_SCALES = {"k_scale": "k_proj", "v_scale": "v_proj"}


def cache_name(name: str, layout: str) -> str:
    """The name of a tensor of compressed-tensors in a layout: ModelOpt stores scales of a KV cache with the projections."""
    parent, _, leaf = name.rpartition(".")
    inside = _CACHE_SCALES.get(leaf) if layout == "modelopt" else None
    return name if inside is None or parent.endswith(f".{inside}") else f"{parent}.{inside}.{leaf}"


def cache_name_back(name: str) -> str:
    """The inverse of ``cache_name``."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent.removesuffix('.' + _CACHE_SCALES[leaf])}.{leaf}" if leaf in _CACHE_SCALES else name
