"""MLX's layout, which mlx_lm and LM Studio load on Macs: write side; ``qkit.files.sources.mlx`` reads it.

Of a linear [out, in]: ``weight`` uint32 [out, in * bits / 32], codes from 0 on as one stream of bits, the first in the lowest;
``scales`` and ``biases`` [out, groups]. The weight is code * scale + bias (mode ``affine``). So a zero point is stored as
-zero * scale. For symmetric weights this is -2^(bits - 1) * scale, which every float holds that holds the scale. Other zero
points need more digits than 16 bits have, and their scales and biases are float32. The modes ``mxfp4`` and ``mxfp8`` have
``scales`` uint8, powers of two, and no biases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkit.tensor.formats import Format
from qkit.tensor.packing import pack_bits, pack_nibbles, packed_words
from qkit.tensor.qtensor import QTensor, param_shape

Spec = tuple[torch.dtype, tuple[int, ...]]
Pair = tuple[Format, Format | None]

METHOD = "mlx"
KEY = "quantization"  # of config.json, which mlx_lm reads
AFFINE = "affine"
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def mode_of(weights: Format) -> str | None:
    """MLX's name for the kind of codes; None for one that it has not."""
    if weights.kind == "int" and not weights.gguf:
        return AFFINE
    return f"mxfp{weights.bits}" if weights.scale == "e8m0" and not weights.gguf else None


def refusal(weights: Format, activations: Format | None, shape: tuple[int, int]) -> str | None:
    """Why MLX's layout has no place for a weight [out, in], or None."""
    if weights.scale == "e4m3":
        return "MLX stores NVFP4 without a global scale, and this is nvfp4, which has one (mxfp4a16 fits)"
    if mode_of(weights) is None or weights.strategy not in ("group", "channel"):
        return f"MLX stores integers, MXFP4 and MXFP8 with a scale for each group, and this is {weights}"
    if activations is not None:
        return f"its inputs are quantized ({activations}), and files of MLX quantize weights only"
    if mode_of(weights) != AFFINE:
        return None
    if weights.bits not in BITS:
        return f"it has {weights.bits} bits, and MLX has {', '.join(map(str, BITS))}"
    if weights.group not in GROUPS:
        found = f"groups of {weights.group}" if weights.group else "one scale per channel"
        return f"it has {found}, and MLX has groups of {', '.join(map(str, GROUPS))} (--group-size 64, --embeddings int8:64)"
    return None


def scale_dtype(weights: Format, dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales and biases in a model of ``dtype``, whatever the zero points are."""
    return dtype if weights.symmetric else torch.float32


def biases(q: QTensor) -> Tensor:
    """float64 [out, groups]: -zero * scale, exactly."""
    half = 1 << (q.format.bits - 1)
    scale = q.params.scale.to(torch.float64)
    return -scale * (half if q.params.zero is None else q.params.zero.to(torch.float64) + half)


def lost_biases(q: QTensor, dtype: torch.dtype) -> int:
    """How many biases of a weight of integers ``dtype`` does not hold exactly."""
    exact = biases(q)
    return int((exact.to(dtype).to(torch.float64) != exact).sum())


def specs(weights: Format, activations: Format | None, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
    """{suffix: (dtype, shape)} of the tensors of a linear [out, in]. dtype: of scales and biases"""
    out, columns = shape
    grid = param_shape(weights, shape)
    found: dict[str, Spec] = {"scales": (dtype if mode_of(weights) == AFFINE else torch.uint8, grid)}
    found["weight"] = (torch.uint32, (out, packed_words(columns, weights.bits)))
    return {"biases": (dtype, grid), **found} if mode_of(weights) == AFFINE else found


def write(q: QTensor, activations: Format | None, static: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """{suffix: tensor} of a linear."""
    if q.format.kind == "int":
        words = pack_bits(q.codes, q.format.bits)
        found = {"biases": biases(q).to(dtype), "scales": q.params.scale.to(dtype)}
    else:
        data = pack_nibbles(q.codes) if q.format.kind == "fp4" else q.codes.contiguous().view(torch.uint8)
        words, found = data.view(torch.int32), {"scales": q.params.scale.to(torch.uint8)}
    return {**found, "weight": words.view(torch.uint32)}


def config(pairs: Mapping[str, Pair], skipped: Sequence[str], heads: Sequence[str], cache: bool) -> dict[str, Any]:
    """The ``quantization_config``: the most common format, and an entry for each layer that has another, or none."""
    settings = {name: _setting(weights) for name, (weights, _) in pairs.items()}
    whole = Counter(tuple(setting.items()) for setting in settings.values()).most_common(1)[0][0]
    others = {name: setting for name, setting in settings.items() if tuple(setting.items()) != whole}
    plain = {name: False for name in skipped if name not in settings}
    return {"quant_method": METHOD, **dict(whole), **dict(sorted({**others, **plain}.items()))}


def _setting(weights: Format) -> dict[str, Any]:
    return {"group_size": weights.group, "bits": weights.bits, "mode": mode_of(weights)}


def keyed_setting(quantization: Mapping[str, Any], name: str) -> tuple[Any, Any, Any]:
    """(mode, bits, group) that a ``quantization`` says of a layer, as they are: in an entry of its own, or for all."""
    entry = quantization.get(name)
    setting = entry if isinstance(entry, Mapping) else quantization
    return setting.get("mode", AFFINE), setting.get("bits"), setting.get("group_size")


def keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What else config.json has: the quantization under the key that mlx_lm reads, and the rotary embedding as configs had it
    before transformers 5. mlx_lm knows no ``rope_parameters`` of most models, and would take a default without a word."""
    quantization = {key: value for key, value in config["quantization_config"].items() if key != "quant_method"}
    parts = {key: {**part, **_rope(part)} for key, part in config.items() if key == "text_config"}
    return {KEY: quantization, **_rope(config), **parts}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The older keys for ``rope_parameters``, those that a config lacks."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    local = rope.get("sliding_attention")  # such configs have parameters for each kind of attention
    rope = rope.get("full_attention", rope)
    found = {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    found["rope_local_base_freq"] = local.get("rope_theta") if isinstance(local, Mapping) else None
    found = {key: value for key, value in found.items() if value is not None}
    # Some models of mlx_lm need this key, null or not.
    found["rope_scaling"] = dict(rope) if rope.get("rope_type", "default") != "default" else None
    return {key: value for key, value in found.items() if config.get(key) is None}
