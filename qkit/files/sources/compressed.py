"""compressed-tensors of every format that qkit runs, and qkit's own results, which add to it.

The config says in groups which layers have which format; the layouts are those of ``qkit.tensor.compressed_tensors``. The
plain weight is what a loader computes, in float32, rounded once to the dtype of the model; of a result with
``quant_method: qkit`` also with its sparse and low-rank parts, and without the transform of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qkit.errors import Unsupported
from qkit.files import schema
from qkit.files.safefile import TensorInfo, read_tensor, shown
from qkit.files.schema import validate
from qkit.files.sources.decoded import CACHE_SCALES, DecodedInfo, Found, Kept, Parts, Stored, row_steps
from qkit.tensor import compressed_tensors as ct
from qkit.tensor import lowrank, sparse
from qkit.tensor.formats import Format
from qkit.tensor.input_transform import RESIDUAL, SCALE, InputTransform
from qkit.tensor.packing import packed_words
from qkit.tensor.qtensor import Params, QTensor, dequantize, param_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
_MORE = (*sparse.PIECES, *lowrank.PIECES, SCALE, RESIDUAL)
_PLAIN = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class _Layer:
    """One quantized linear of the config: its formats, shape, the Hadamard block of its inputs, and whether columns have
    groups in an order of their own."""

    weights: Format
    activations: Format | None
    shape: tuple[int, int]
    rotation: int


def find(stored: Stored) -> Found:
    """The compressed linears of a folder. Raises Unsupported for formats that qkit does not run, BadCheckpoint for tensors that
    do not fit them."""
    config = dict(stored.quantization)
    where = f"{stored.where / 'config.json'}: quantization_config"
    _refuse_more(config, where)
    validate(schema.Quantization, config, where, "get the config of this model", Unsupported)
    names = [name.removesuffix(".weight_scale") for name in stored.tensors if name.endswith(".weight_scale")]
    formats = ct.formats_of(config, names, str(stored.where))
    rotations = _rotations(config.get("rotated") or {}, where)
    weights, dropped = dict[str, DecodedInfo](), list[str]()
    for name in names:
        if name not in formats:
            stored.refuse(
                f"{name}.weight_scale", "has no format in config.json: no group of quantization_config is about it"
            )
        weights[f"{name}.weight"] = _linear(stored, name, formats[name], rotations.get(name, 0))
        dropped += [n for leaf in _INPUTS if (n := f"{name}.{leaf}") in stored.tensors]
    dropped += [name for name in stored.tensors if name.endswith(CACHE_SCALES)]
    return Found(weights, dropped)


def _refuse_more(config: Mapping[str, Any], where: str) -> None:
    """Raises Unsupported for parts of the format that change weights and that qkit does not run."""
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise Unsupported(
            f"{where}: sparsity_config.format is {shown(sparsity['format'])}, and qkit decodes dense weights: use the "
            "original model"
        )
    transform = config.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        raise Unsupported(
            f"{where}: transform_config rotates weights, and qkit does not decode that: use the original model"
        )


def _rotations(data: Any, where: str) -> dict[str, int]:
    """{linear: block of the Hadamard transform of its inputs}. Raises Unsupported for anything but powers of two."""
    blocks = data.values() if isinstance(data, dict) else [None]
    if not all(type(b) is int and b >= 2 and b & (b - 1) == 0 for b in blocks):
        raise Unsupported(f"{where}.rotated: expected layers and powers of two: get the config of this model")
    return dict(data)


def _linear(stored: Stored, name: str, formats: tuple[Format, Format | None], rotation: int) -> DecodedInfo:
    weights, activations = formats
    lacking = weights.strategy in ("group", "tensor_group") and not weights.group
    if lacking or (weights.strategy == "block" and not weights.block):
        raise Unsupported(
            f"{stored.where}: config.json: strategy {weights.strategy!r} of {shown(name)} says no size: get the "
            "config of this model"
        )
    parts = _parts(stored, name, activations)
    layer = _Layer(weights, activations, _shape(stored, name, weights, parts), rotation)
    if layer.shape[1] % (weights.group or 1) or layer.shape[1] % (rotation or 1):
        stored.refuse(
            f"{name}.weight_scale", f"is for a weight {list(layer.shape)}, whose columns its groups do not divide"
        )
    _check_parts(stored, name, layer, parts)
    plain = f"{name}.weight"
    if plain in stored.tensors and "weight_packed" in parts:
        stored.refuse(plain, f"is there beside {name}.weight_packed: the same weight twice")
    decode = partial(_decode, layer=layer, dtype=stored.torch_dtype)
    encoding = f"compressed-tensors {weights}"
    return stored.decoded(plain, layer.shape, parts, decode, encoding, _kept(layer, parts))


def _parts(stored: Stored, name: str, activations: Format | None) -> dict[str, TensorInfo]:
    """The stored tensors of a linear by suffix, that with its codes first."""
    codes = "weight_packed" if f"{name}.weight_packed" in stored.tensors else "weight"
    stored.part(f"{name}.{codes}", "tensor", f"{name}.weight_scale")
    leaves = (codes, "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx", *_MORE)
    inputs = _INPUTS if activations is not None else ()
    return {leaf: stored.tensors[f"{name}.{leaf}"] for leaf in (*leaves, *inputs) if f"{name}.{leaf}" in stored.tensors}


def _shape(stored: Stored, name: str, weights: Format, parts: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """(out, in): of plain codes their own, of packed ones what ``weight_shape`` says, which is read."""
    codes = next(iter(parts.values()))
    if len(codes.shape) != 2:
        stored.refuse(codes.name, f"has shape {list(codes.shape)}, expected a matrix")
    if "weight_packed" not in parts:
        return codes.shape[0], codes.shape[1]
    if weights.kind == "fp4":
        return codes.shape[0], codes.shape[1] * 2
    info = stored.part(f"{name}.weight_shape", "tensor", codes.name)
    values = read_tensor(info).flatten().tolist() if info.dtype in ("I64", "I32") else []
    words = -(-values[1] * weights.bits // 32) if len(values) == 2 else -1
    if len(values) != 2 or (values[0], words) != codes.shape:
        stored.refuse(info.name, f"says {values}, which {list(codes.shape)} words of {weights.bits} bits are not")
    return values[0], values[1]


def _check_parts(stored: Stored, name: str, layer: _Layer, parts: Mapping[str, TensorInfo]) -> None:
    """Raises BadCheckpoint for a tensor that is missing or not what the format says; codes may be packed or not."""
    fmt = layer.weights
    rows, columns = param_shape(fmt, layer.shape)
    floats = {"e4m3": ("F8_E4M3",), "e8m0": ("U8", "F8_E8M0")}.get(fmt.scale, _PLAIN)
    packed = "weight_packed" in parts
    codes = {"int": "I32" if packed else "I8", "fp4": "U8", "fp8": "F8_E4M3"}[fmt.kind]
    _check(stored, next(iter(parts.values())), (codes,), None)
    _check(stored, parts["weight_scale"], floats, rows * columns)
    if not fmt.symmetric:
        zero = stored.part(f"{name}.weight_zero_point", "tensor", f"{name}.weight_scale")
        words = packed_words(rows, fmt.bits) * columns
        _check(stored, zero, ("I32", "I8"), words if zero.dtype == "I32" else rows * columns)
    if fmt.scale == "e4m3":
        whole = stored.part(f"{name}.weight_global_scale", "tensor", f"{name}.weight_scale")
        _check(stored, whole, ("F32",), 1)


def _check(stored: Stored, info: TensorInfo, dtypes: tuple[str, ...], count: int | None) -> None:
    """count: how many values it must have; None: any number"""
    if info.dtype not in dtypes or (count is not None and math.prod(info.shape) != count):
        values = "" if count is None else f" with {count} values"
        found = f"{info.dtype} {list(info.shape)}"
        stored.refuse(info.name, f"is {found}, and config.json implies {' or '.join(dtypes)}{values}")


def _decode(parts: Parts, layer: _Layer, dtype: torch.dtype) -> Tensor:
    """The plain weight, some rows at a time."""
    import torch

    tensors = dict(parts)
    q = ct.read(tensors, layer.weights, layer.shape)
    branch = lowrank.read(tensors, layer.shape)
    plain = QTensor(q.codes, q.params, q.format, sparse.read(tensors))
    order, inputs = parts.get("weight_g_idx"), _inputs(parts, layer)
    if plain.sparse is not None or branch is not None or layer.weights.strategy == "block":
        whole = dequantize(QTensor(q.codes, q.params, q.format, plain.sparse, branch))
        return inputs.weight_back(whole).to(dtype)
    result = torch.empty(layer.shape, dtype=dtype)
    for some in row_steps(*layer.shape):
        rows = dequantize(_some_rows(q, some)) if order is None else _in_order(_some_rows(q, some), order.long())
        result[some] = inputs.weight_back(rows)
    return result


def _inputs(parts: Parts, layer: _Layer) -> InputTransform:
    return InputTransform.of(parts.get(SCALE), layer.rotation, parts.get(RESIDUAL), layer.shape[1])


def _some_rows(q: QTensor, some: slice) -> QTensor:
    """Rows of a weight whose scales are of rows, or one."""
    p = q.params
    whole = q.format.strategy == "tensor"
    zero = None if p.zero is None else p.zero if whole else p.zero[some]
    return QTensor(q.codes[some], Params(p.scale if whole else p.scale[some], zero, p.global_scale), q.format)


def _in_order(q: QTensor, group_of: Tensor) -> Tensor:
    """float32 [rows, in] of a weight whose columns name their groups (``weight_g_idx``)."""
    import torch

    values = q.codes.to(torch.float32)
    if q.params.zero is not None:
        values = values - q.params.zero.to(torch.float32)[:, group_of]
    return values * q.params.scale.to(torch.float32)[:, group_of]


def _kept(layer: _Layer, parts: Mapping[str, TensorInfo]) -> Kept | str:
    """The same codes and scales, in the layout that qkit writes for such layers."""
    if layer.rotation or any(leaf in parts for leaf in _MORE):
        return "its sparse or low-rank part, or the transform of its inputs, belongs to the run that made it"
    if "weight_g_idx" in parts:
        return "a result has no place for groups of columns in the order of activations (weight_g_idx)"
    weights, activations, dtype = layer.weights, layer.activations, parts["weight_scale"].torch_dtype
    specs = ct.specs(weights, activations, layer.shape, dtype)
    missing = next((leaf for leaf in specs if leaf.startswith("input_") and leaf not in parts), None)
    if missing is not None:
        return f"its {missing} is not there, and config.json says that inputs have one"

    def make(read: Parts) -> dict[str, Tensor]:
        static = read.get("input_scale", read.get("input_global_scale"))
        return ct.write(ct.read(dict(read), weights, layer.shape), activations, static, dtype)

    return Kept(weights=weights, activations=activations, specs=specs, make=make)
