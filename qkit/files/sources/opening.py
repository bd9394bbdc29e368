"""The view of a folder in which every tensor is a plain one, whatever the way in which it is stored.

The config says which decoder to ask (``quant_method``); where it says nothing, the tensors tell. What no decoder knows is
refused with its name: a weight that was taken for numbers when it is codes would be wrong without a word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.errors import BadCheckpoint, Unsupported
from qkit.files.folder import QUANTIZED_NAMES, load_json
from qkit.files.safefile import TensorInfo, shown
from qkit.files.sources import autoround, awq, fp8, gguf, gptq, mxfp4
from qkit.files.sources.decoded import CHUNK, DecodedInfo, Found, Stored

KEYS = ("quantization_config", "compression_config")
MLX = "quantization"  # the key of mlx_lm, which says no method


def _compressed(stored: Stored) -> Found:
    from qkit.files.sources import compressed  # this one alone imports torch

    return compressed.find(stored)


def _modelopt(stored: Stored) -> Found:
    from qkit.files.sources import modelopt  # it shares the formats of compressed-tensors, and torch with them

    return modelopt.find(stored)


def _mlx(stored: Stored) -> Found:
    from qkit.files.sources import mlx  # as above

    return mlx.find(stored)


DECODERS: dict[str, Callable[[Stored], Found]] = {
    "fp8": fp8.find,
    "fbgemm_fp8": fp8.find,
    "mxfp4": mxfp4.find,
    "compressed-tensors": _compressed,
    "qkit": _compressed,
    "gptq": gptq.find,
    "awq": awq.find,
    "auto-round": autoround.find,
    "modelopt": _modelopt,
    "mlx": _mlx,
    "gguf": gguf.find,
}
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_TOLD_BY = {".weight_scale_inv": "fp8", "_blocks": "mxfp4"}  # by tensors that say all that their decoder must know
_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "half": "F16", "float": "F32"}
_WORDS = "fp8, mxfp4, compressed-tensors, gptq, awq, auto-round, modelopt and mlx"


@dataclass(frozen=True)
class PlainView:
    """Tensors by plain names, and the config without a word of quantization."""

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]


def quantization_of(folder: Path, names: list[str], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json, at any depth, or a file beside it says of the way in which a model is quantized; None for nothing.

    Raises Unsupported where there are two different ones, or one that is no object.
    """
    if (mlx := mlx_quantization(config)) is not None:
        return mlx
    found = [value for node in _objects(config) for key in KEYS if (value := node.get(key))]
    if any(value != found[0] for value in found):
        raise Unsupported(f"{folder}: config.json has two quantization_configs that differ: use the original model")
    if found and not isinstance(found[0], dict):
        raise Unsupported(
            f"{folder}: config.json: quantization_config is {shown(found[0])}, expected an object: dequantize the model first"
        )
    if found:
        return dict(found[0])
    beside = next((name for name in BESIDE if name in names), None)
    if beside is None:
        return None
    content = load_json(folder / beside, "quantization config")
    return {"quant_method": BESIDE[beside], **(content if isinstance(content, dict) else {})}


def mlx_quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a model is quantized, as mlx_lm writes it, with the method; None where a config does not say so, or names another
    method."""
    settings, other = config.get(MLX), config.get("quantization_config")
    named = isinstance(other, dict) and other.get("quant_method", "mlx") != "mlx"
    if not isinstance(settings, dict) or not {"bits", "group_size"} <= settings.keys() or named:
        return None
    return {**settings, "quant_method": "mlx"}


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config without what it says of quantization, at any depth."""

    def clean(node: Any) -> Any:
        if isinstance(node, list):
            return [clean(item) for item in node]
        if not isinstance(node, dict):
            return node
        return {key: clean(item) for key, item in node.items() if key not in KEYS}

    drop = () if mlx_quantization(config) is None else (MLX,)
    result: dict[str, Any] = clean({key: value for key, value in config.items() if key not in drop})
    return result


def plain_view(folder: Path, names: list[str], config: dict[str, Any], tensors: dict[str, TensorInfo]) -> PlainView:
    """The plain view of a folder; the folder as it is where nothing in it is quantized.

    Raises Unsupported for a way of storing that qkit does not decode, BadCheckpoint for one that is damaged.
    """
    quantization = quantization_of(folder, names, config)
    method = _method(folder, quantization, tensors)
    if method is None:
        return PlainView(config, tensors)
    plain = without_quantization(config)
    stored = Stored(where=folder, quantization=quantization or {}, tensors=tensors, dtype=_dtype(plain, tensors))
    found = DECODERS[method](stored)
    used = {part.name for info in found.weights.values() for part in info.parts.values()}
    rest = {name: info for name, info in tensors.items() if name not in used and name not in found.dropped}
    _check_rest(stored, rest)
    if not found.weights:
        raise BadCheckpoint(
            f"{folder}: config.json says that the model is quantized ({method}), and no tensor is stored so: get the model "
            "again, or take quantization_config out of config.json if its weights are plain"
        )
    return PlainView(plain, rest | dict(found.weights))


def _objects(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config and all objects in it, the outer first."""
    nodes: list[Any] = [config]
    for node in nodes:
        nodes += [v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, (dict, list))]
    return [node for node in nodes if isinstance(node, dict)]


def _method(folder: Path, quantization: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> str | None:
    if quantization is not None:
        method = quantization.get("quant_method")
        if not isinstance(method, str) or method not in DECODERS:
            named = shown(method) if method else "unknown method"
            raise Unsupported(
                f"{folder}: config.json: quantization_config says that the model is quantized by {named}, and qkit decodes "
                f"{_WORDS}: dequantize it first, or use the original model"
            )
        return method
    for name, info in tensors.items():
        for suffix, method in _TOLD_BY.items():
            if name.endswith(suffix) and (method == "fp8" or info.dtype == "U8"):
                return method
        for suffix, method in QUANTIZED_NAMES.items():
            if name.endswith(suffix):
                raise Unsupported(
                    f"{folder}: tensor {shown(name)} says that the model is quantized already ({method}), and config.json has "
                    "no quantization_config that says how: get the config of this model, dequantize it first, or use the "
                    "original model"
                )
        if info.dtype in fp8.CODES:
            return "fp8"
    return None


def _dtype(config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype of the model: what its config says, else what most bytes of its plain tensors have, else bfloat16.

    A config may say it of a part alone, the language model first.
    """
    for node in _objects(config):
        for key in ("dtype", "torch_dtype"):
            text = str(node.get(key)).removeprefix("torch.")
            if text in _FLOATS:
                return _FLOATS[text]
    sizes: Counter[str] = Counter()
    for name, info in tensors.items():
        if info.dtype in _FLOATS.values() and "scale" not in name:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else "BF16"


def _check_rest(stored: Stored, rest: Mapping[str, TensorInfo]) -> None:
    """Raises BadCheckpoint for a stored tensor that belongs to a quantized weight and was used for none."""
    for name, info in rest.items():
        suffix = next((s for s in QUANTIZED_NAMES if name.endswith(s)), None)
        if suffix is not None or info.dtype.startswith("F8_"):
            method = stored.quantization.get("quant_method", "the model")
            raise BadCheckpoint(
                f"{info.file}: tensor {shown(name)} ({info.dtype}) belongs to a quantized weight that is not there, or that "
                f"{shown(method)} does not store so: get the model again from its source"
            )


def decoding_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Peak bytes of decoding a tensor, beside the plain one: what is stored of it, its codes a byte each, and float32 buffers
    of some rows; 0 where nothing is decoded."""
    sizes = [
        sum(part.nbytes for part in info.parts.values()) + count + 12 * min(count, CHUNK)
        for info in tensors.values()
        if isinstance(info, DecodedInfo) and (count := math.prod(info.shape))
    ]
    return max(sizes, default=0)


def encodings(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """{way of storing, in words: how many weights} of the decoded ones."""
    return dict(Counter(info.encoding for info in tensors.values() if isinstance(info, DecodedInfo)).most_common())
