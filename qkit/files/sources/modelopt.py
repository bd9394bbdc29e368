"""Checkpoints of NVIDIA ModelOpt: NVFP4, FP8, MXFP8, MXFP4 and INT4, one algorithm for all linears or one for each.

The layout is that of ``qkit.tensor.layouts.modelopt``, and two more that qkit only reads. MXFP4 has no ``weight_scale_2``, and
``weight_scale`` uint8 [out, in / 32]. W4A16_AWQ has ``weight`` uint8 [out / 2, in], signed codes with the even row in the low
half, and ``weight_scale`` [out, in / group]. The algorithms of AWQ may have ``pre_quant_scale`` [in], which the inputs are
multiplied with: the plain weight has it in its columns.

Which linears are quantized is seen from their tensors; config.json (or hf_quant_config.json) says of each by which algorithm.
``weight_scale_2`` is multiplied with, and the global scale of compressed-tensors is divided by: the one is the reciprocal of
the other, rounded to float32. The plain weight is code * (scale / global scale) in float32, times ``pre_quant_scale`` where
there is one, rounded once to the dtype of the model; ModelOpt's own product, code * scale * weight_scale_2, is within two units
in the last place of float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qkit.errors import Unsupported
from qkit.files.folder import load_json
from qkit.files.safefile import TensorInfo, shown
from qkit.files.sources.decoded import CACHE_SCALES, DecodedInfo, Found, Kept, Parts, Stored, row_steps
from qkit.tensor import compressed_tensors as ct
from qkit.tensor.formats import ACTIVATION_FORMATS, FORMATS, Format
from qkit.tensor.layouts.modelopt import ALGORITHMS, FILE, MIXED, Pair, inverse, pair_of
from qkit.tensor.packing import unpack_nibbles
from qkit.tensor.qtensor import Params, QTensor, dequantize, param_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_READ_ONLY: dict[str, Pair] = {
    "MXFP4": (FORMATS["mxfp4"], ACTIVATION_FORMATS["mxfp4_dynamic"]),
    "W4A16_AWQ": (FORMATS["int4"], None),
}
_PAIRS = {**{name: pair_of(name) for name in ALGORITHMS}, **_READ_ONLY}
_ALIASES = {"FP8_PC_PT": "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES": "FP8_PB_WO", "NVFP4_AWQ": "NVFP4"}
_CODES = {"fp4": "U8", "fp8": "F8_E4M3", "int": "U8"}
_MORE = ("svdquant_lora_a", "svdquant_lora_b")


def find(stored: Stored) -> Found:
    """The quantized linears of a folder. Raises Unsupported for algorithms that qkit does not decode, BadCheckpoint for tensors
    that do not fit theirs."""
    quantization = _quantization(stored)
    names = [name.removesuffix(".weight_scale") for name in stored.tensors if name.endswith(".weight_scale")]
    algorithms = _algorithms(stored, quantization, names)
    weights = {f"{name}.weight": _linear(stored, name, algorithms[name]) for name in names}
    dropped = [n for name in names if (n := f"{name}.input_scale") in stored.tensors]
    return Found(weights, [*dropped, *(name for name in stored.tensors if name.endswith(CACHE_SCALES))])


def _quantization(stored: Stored) -> Mapping[str, Any]:
    """The object with ``quant_algo``: config.json has it at the top, hf_quant_config.json under 'quantization'."""
    found = stored.quantization
    inner = found.get("quantization")
    if "quant_algo" not in found and isinstance(inner, dict):
        return inner
    if "quant_algo" not in found and (stored.where / FILE).is_file():
        content = load_json(stored.where / FILE, "quantization config")
        inner = content.get("quantization") if isinstance(content, dict) else None
        return inner if isinstance(inner, dict) else found
    return found


def _algorithms(stored: Stored, quantization: Mapping[str, Any], names: list[str]) -> dict[str, str]:
    """{linear: the algorithm by which it is quantized}"""
    whole = str(quantization.get("quant_algo") or "").upper()
    layers = quantization.get("quantized_layers") if whole == MIXED else None
    if whole == MIXED and not (isinstance(layers, dict) and all(isinstance(x, dict) for x in layers.values())):
        raise Unsupported(
            f"{stored.where}: quant_algo is {MIXED}, and quantized_layers says of no layer how: get the config of this model"
        )
    found: dict[str, str] = {}
    for name in names:
        if layers is not None and name not in layers:
            stored.refuse(f"{name}.weight_scale", "belongs to a layer that quantized_layers does not list")
        text = whole if layers is None else str(layers[name].get("quant_algo") or "").upper()
        found[name] = _ALIASES.get(text, text)
        if found[name] not in _PAIRS:
            raise Unsupported(
                f"{stored.where}: {name} is quantized by ModelOpt's {shown(text)}, and qkit decodes {', '.join(_PAIRS)}: "
                "dequantize the model first, or use the original"
            )
    return found


def _linear(stored: Stored, name: str, algorithm: str) -> DecodedInfo:
    weights, activations = _PAIRS[algorithm]
    more = next((leaf for leaf in _MORE if f"{name}.{leaf}" in stored.tensors), None)
    if more is not None:
        raise Unsupported(
            f"{stored.where}: {name} has {more}, which is added to its weight, and qkit does not decode that: use the original"
        )
    codes = stored.part(f"{name}.weight", "tensor", f"{name}.weight_scale")
    if codes.dtype != _CODES[weights.kind] or len(codes.shape) != 2:
        expected = f"{_CODES[weights.kind]}, a matrix, for {algorithm}"
        stored.refuse(codes.name, f"is {codes.dtype} {list(codes.shape)}, expected {expected}")
    per_byte = {"fp4": (1, 2), "int": (2, 1)}.get(weights.kind, (1, 1))
    shape = codes.shape[0] * per_byte[0], codes.shape[1] * per_byte[1]
    scale = stored.tensors[f"{name}.weight_scale"]
    parts = {"codes": codes, "scale": scale}
    if weights.kind == "int":
        weights = replace(weights, group=_group(stored, shape, scale))
    if weights.block is not None:
        weights = replace(weights, block=_block(stored, shape, scale))
    if shape[1] % (weights.group or 1):
        stored.refuse(codes.name, f"is for {shape[1]} columns, which groups of {weights.group} do not divide")
    _check(stored, scale, _scale_dtypes(weights), math.prod(param_shape(weights, shape)))
    if weights.scale == "e4m3":
        parts["scale_2"] = stored.part(f"{name}.weight_scale_2", "tensor", scale.name)
        _check(stored, parts["scale_2"], ("F32",), 1)
    if activations is not None and f"{name}.input_scale" in stored.tensors:
        parts["input_scale"] = stored.tensors[f"{name}.input_scale"]
        _check(stored, parts["input_scale"], ("F32", "BF16", "F16"), 1)
    if f"{name}.pre_quant_scale" in stored.tensors:
        parts["of_inputs"] = stored.tensors[f"{name}.pre_quant_scale"]
        _check(stored, parts["of_inputs"], ("F32", "BF16", "F16"), shape[1])
    read = partial(_read, weights=weights, shape=shape)
    decode = partial(_decode, read=read, dtype=stored.torch_dtype)
    kept = _kept(weights, activations, shape, parts, read)
    return stored.decoded(f"{name}.weight", shape, parts, decode, f"ModelOpt {algorithm}", kept)


def _scale_dtypes(weights: Format) -> tuple[str, ...]:
    return {"e4m3": ("F8_E4M3",), "e8m0": ("U8", "F8_E8M0")}.get(weights.scale, ("F32", "BF16", "F16"))


def _group(stored: Stored, shape: tuple[int, int], scale: TensorInfo) -> int:
    """Columns of a group, from the scales [out, groups]."""
    if len(scale.shape) != 2 or scale.shape[0] != shape[0] or shape[1] % scale.shape[1]:
        stored.refuse(scale.name, f"has shape {list(scale.shape)}, which are no groups of a weight {list(shape)}")
    return shape[1] // scale.shape[1]


def _block(stored: Stored, shape: tuple[int, int], scale: TensorInfo) -> tuple[int, int]:
    """Rows and columns of a block, from the grid of scales [rows, 1, columns, 1]."""
    grid = [n for n in scale.shape if n != 1] if len(scale.shape) != 4 else [scale.shape[0], scale.shape[2]]
    if len(grid) != 2 or any(size % count for size, count in zip(shape, grid, strict=True)):
        stored.refuse(scale.name, f"has shape {list(scale.shape)}, which is no grid of blocks over {list(shape)}")
    return shape[0] // grid[0], shape[1] // grid[1]


def _check(stored: Stored, info: TensorInfo, dtypes: tuple[str, ...], count: int) -> None:
    if info.dtype not in dtypes or math.prod(info.shape) != count:
        found = f"{info.dtype} {list(info.shape)}"
        stored.refuse(info.name, f"is {found}, expected {' or '.join(dtypes)} with {count} values")


def _read(parts: Parts, weights: Format, shape: tuple[int, int]) -> QTensor:
    import torch

    codes = parts["codes"]
    if weights.kind == "fp4":
        codes = unpack_nibbles(codes)
    elif weights.kind == "int":  # two rows in a byte; a signed number of 4 bits from one of 0 to 15
        codes = ((torch.stack((codes & 15, codes >> 4), dim=1).flatten(0, 1) ^ 8).to(torch.int8)) - 8
    scale = parts["scale"].reshape(param_shape(weights, shape))
    scale = scale.view(torch.uint8) if weights.scale == "e8m0" else scale
    whole = inverse(parts["scale_2"].reshape(1)) if "scale_2" in parts else None
    return QTensor(codes, Params(scale, None, whole), weights)


def _decode(parts: Parts, read: partial[QTensor], dtype: torch.dtype) -> Tensor:
    """The plain weight, some rows at a time where its scales are of rows."""
    import torch

    q = read(parts)
    of_inputs = parts["of_inputs"].to(torch.float32) if "of_inputs" in parts else 1
    if q.params.scale.shape[0] != q.shape[0]:
        return (dequantize(q) * of_inputs).to(dtype)
    result = torch.empty(q.shape, dtype=dtype)
    for some in row_steps(*q.shape):
        rows = Params(q.params.scale[some], None, q.params.global_scale)
        result[some] = (dequantize(QTensor(q.codes[some], rows, q.format)) * of_inputs).to(dtype)
    return result


def _kept(
    weights: Format,
    activations: Format | None,
    shape: tuple[int, int],
    parts: Mapping[str, TensorInfo],
    read: partial[QTensor],
) -> Kept | str:
    """The same codes and scales, as compressed-tensors names them."""
    dtype = parts["scale"].torch_dtype if weights.scale == "model" else None
    import torch

    if "of_inputs" in parts:
        return "its inputs are multiplied by pre_quant_scale, which a result has no place for"
    dtype = dtype or torch.float32
    specs = ct.specs(weights, activations, shape, dtype)
    if any(leaf.startswith("input_") for leaf in specs) and "input_scale" not in parts:
        return "its input_scale is not there, and its algorithm says that inputs have one"

    def make(stored: Parts) -> dict[str, Tensor]:
        static = stored["input_scale"].to(torch.float32) if "input_scale" in stored else None
        if static is not None and activations is not None and activations.strategy == "tensor_group":
            static = inverse(static.reshape(1))
        return ct.write(read(stored), activations, static, dtype)

    return Kept(weights=weights, activations=activations, specs=specs, make=make)
