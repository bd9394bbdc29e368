"""Results in the layouts of GPTQ, AWQ, ModelOpt and MLX: what cannot be stored so is refused when the plan is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qkit.errors import Unsupported
from qkit.families.discover import kind_of
from qkit.families.structure import ModelStructure
from qkit.planning.linear_plan import LinearPlan
from qkit.tensor.formats import Format
from qkit.tensor.layouts.table import LAYOUTS, refusal, scale_dtype
from qkit.verification.fused_layers import expert_groups
from qkit.verification.mlx_table import experts_refusal

_HEAD, _EMBEDDINGS = "head", "embeddings"


def check_layout(
    export: str,
    packed: Mapping[str, LinearPlan],
    kept: Mapping[str, LinearPlan],
    structure: ModelStructure,
    cache: bool,
) -> None:
    """Raises Unsupported for linears, or scales of a KV cache, that the layout has no place for.

    packed: all that has a format; kept: those of them that stay as the source stores them
    """
    layout = LAYOUTS.get(export)
    if layout is None:
        return
    if not structure.is_language_model:
        raise Unsupported(
            f"--export {export}: it is for language models, and this is a {type(structure.model).__name__}: leave it out"
        )
    ends = [name for name, p in packed.items() if _EMBEDDINGS in p.uses]
    pairs = {name: (p.weights, p.activations) for name, p in packed.items()}
    reason = refusal(layout, pairs, {name: p.shape for name, p in packed.items()}, ends)
    if reason is None and cache and not layout.cache:
        reason = f"{layout.title} has no place for the scales of an FP8 KV cache (--kv fp8)"
    if reason is None and kept:
        reason = f"{next(iter(kept))}: --keep-source writes compressed-tensors: use 'qkit convert' on the result"
    if reason is None and export in ("gptq", "awq") and structure.dtype == torch.float32:
        reason = f"{layout.title} has scales of 16 bits, and those of a float32 model have 32"
    if reason is None and export == "mlx":
        reason = mlx_refusal(pairs, kind_of(structure.checkpoint.config))
    if reason is None and export == "mlx" and structure.dtype == torch.float32:
        reason = _zero_points(pairs)
    if reason is not None:
        raise Unsupported(f"--export {export}: {reason}: choose another scheme, or leave --export out")


def mlx_refusal(pairs: Mapping[str, tuple[Format, Format | None]], model_type: str) -> str | None:
    """Why mlx_lm does not load the experts among these linears, or None."""
    for layer, names in expert_groups(pairs).items():
        torn = layer if len({pairs[name] for name in names}) > 1 else ""
        if reason := experts_refusal(model_type, torn):
            return f"{names[0]}: mlx_lm does not load it: {reason}"
    return None


def _zero_points(pairs: Mapping[str, tuple[Format, Format | None]]) -> str | None:
    """Why MLX has no place for the first linear with zero points of a float32 model, or None."""
    first = next((name for name, (weights, _) in pairs.items() if not weights.symmetric), None)
    if first is None:
        return None
    return f"{first}: MLX stores zero point * scale, and float32, which the scales of this model have, does not hold it"


def layout_config(
    export: str, packed: Mapping[str, LinearPlan], skipped: list[str], head: str | None, cache: bool
) -> dict[str, Any]:
    """The ``quantization_config`` of a plan in one of the layouts."""
    pairs = {name: (p.weights, p.activations) for name, p in packed.items()}
    heads = [*([] if head is None else [head]), *(name for name, p in packed.items() if _HEAD in p.uses)]
    return LAYOUTS[export].config(pairs, skipped, heads, cache)


def layout_bytes(
    export: str, weights: Format, activations: Format | None, shape: tuple[int, int], dtype: torch.dtype
) -> int:
    """Bytes of the stored tensors of a linear in one of the layouts."""
    specs = LAYOUTS[export].specs(weights, activations, shape, scale_dtype(export, weights, dtype, dtype))
    return sum(math.prod(size) * stored.itemsize for stored, size in specs.values())
