"""MLX's layout, of mlx_lm and of qkit; ``qkit.tensor.layouts.mlx`` writes it.

Of a linear or an embedding [out, in]: ``weight`` uint32 [out, in * bits / 32], ``scales`` and, of integers, ``biases``
[out, groups]. The plain weight is code * scale + bias, formed without rounding and rounded once to the dtype of the model.
mlx_lm chooses biases freely. Those that are whole multiples of their scales, as qkit writes them, stand for zero points, and
only they can be kept as integers. NVFP4 has no global scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from qkit.errors import Unsupported
from qkit.files.safefile import TensorInfo, shown
from qkit.files.sources.decoded import DecodedInfo, Found, Kept, Parts, Stored, row_steps
from qkit.tensor import compressed_tensors as ct
from qkit.tensor.formats import FORMATS, Format
from qkit.tensor.layouts.mlx import AFFINE, BITS, keyed_setting
from qkit.tensor.packing import unpack_bits, unpack_nibbles
from qkit.tensor.qtensor import Params, QTensor, dequantize

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FLOATS = ("BF16", "F16", "F32")
_MODES = {"mxfp4": FORMATS["mxfp4"], "mxfp8": FORMATS["mxfp8"], "nvfp4": FORMATS["nvfp4"]}
_WORD = 32  # bits


def find(stored: Stored) -> Found:
    """The quantized matrices of a folder. Raises Unsupported for modes that qkit does not decode, BadCheckpoint for tensors
    that do not fit theirs."""
    names = [name.removesuffix(".scales") for name in stored.tensors if name.endswith(".scales")]
    return Found({f"{name}.weight": _linear(stored, name) for name in names}, ())


def _linear(stored: Stored, name: str) -> DecodedInfo:
    mode, bits, group = keyed_setting(stored.quantization, name)
    known = mode in _MODES or (mode == AFFINE and bits in BITS and type(group) is int and group > 0)
    if not known:
        raise Unsupported(
            f"{stored.where}: config.json: quantization: {shown(name)} has {shown(bits)} bits, group_size {shown(group)} and "
            f"mode {shown(mode)}, and qkit decodes {', '.join(_MODES)} and {AFFINE} with {', '.join(map(str, BITS))} bits: "
            "dequantize the model first, or use the original"
        )
    fmt = _MODES.get(mode) or replace(FORMATS[f"int{bits}_asym"], group=group)
    parts = {
        "codes": stored.part(f"{name}.weight", "tensor", f"{name}.scales"),
        "scale": stored.tensors[f"{name}.scales"],
    }
    if mode == AFFINE:
        parts["bias"] = stored.part(f"{name}.biases", "tensor", f"{name}.scales")
    shape = _shape(stored, parts, fmt)
    decode = partial(_decode, fmt=fmt, shape=shape, dtype=stored.torch_dtype)
    return stored.decoded(
        f"{name}.weight", shape, parts, decode, f"MLX {mode} with {fmt.bits} bits", _kept(fmt, shape, parts)
    )


def _shape(stored: Stored, parts: Mapping[str, TensorInfo], fmt: Format) -> tuple[int, int]:
    """(out, in), after a check of all shapes and dtypes."""
    codes, scale = parts["codes"], parts["scale"]
    if len(codes.shape) == 3:
        raise Unsupported(
            f"{codes.file}: tensor {shown(codes.name)} has all experts of a layer, as mlx_lm stacks them, and qkit reads MLX's "
            "linears only: use the original model"
        )
    group = fmt.group or 1
    rows, words = codes.shape if len(codes.shape) == 2 else (0, 1)
    columns = words * _WORD // fmt.bits
    if codes.dtype != "U32" or not rows or words * _WORD % (fmt.bits * group):
        expected = f"U32 [out, in * {fmt.bits} / {_WORD}] with groups of {group}"
        stored.refuse(codes.name, f"is {codes.dtype} {list(codes.shape)}, expected {expected}")
    grid, dtypes = (rows, columns // group), _FLOATS if fmt.kind == "int" else ("U8",)
    for info in (scale, *(parts[role] for role in ("bias",) if role in parts)):
        if info.dtype not in dtypes or info.shape != grid:
            expected = f"{' or '.join(dtypes)} {list(grid)}, as config.json says"
            stored.refuse(info.name, f"is {info.dtype} {list(info.shape)}, expected {expected}")
    return rows, columns


def _read(parts: Parts, fmt: Format, columns: int) -> QTensor:
    """The weight without its biases, which are no zero points yet."""
    import torch

    words, scale, whole = parts["codes"].contiguous().view(torch.int32), parts["scale"], None
    if fmt.kind == "int":
        return QTensor(unpack_bits(words, fmt.bits, columns), Params(scale), fmt)
    data = words.view(torch.uint8)
    codes = unpack_nibbles(data) if fmt.kind == "fp4" else data.view(torch.float8_e4m3fn)
    if fmt.scale == "e4m3":
        scale, whole = scale.view(torch.float8_e4m3fn), torch.ones(1)
    return QTensor(codes, Params(scale, None, whole), fmt)


def _decode(parts: Parts, fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The plain weight, some rows at a time."""
    import torch

    result = torch.empty(shape, dtype=dtype)
    for some in row_steps(*shape):
        q = _read({role: tensor[some] for role, tensor in parts.items()}, fmt, shape[1])
        if fmt.kind != "int":
            result[some] = dequantize(q).to(dtype)
            continue
        # Sums of products of 16 bits are exact in float32.
        wide = torch.float64 if q.params.scale.dtype == torch.float32 else torch.float32
        scale, bias = (t[some].to(wide)[..., None] for t in (parts["scale"], parts["bias"]))
        codes = (q.codes.to(wide) + (1 << (fmt.bits - 1))).unflatten(1, (-1, fmt.group))
        result[some] = (codes * scale + bias).flatten(1).to(torch.float32).to(dtype)
    return result


def _kept(fmt: Format, shape: tuple[int, int], parts: Mapping[str, TensorInfo]) -> Kept:
    """The same codes and scales, and zero points for biases, as compressed-tensors has them."""
    dtype = parts["scale"].torch_dtype

    def make(stored: Parts) -> dict[str, Tensor]:
        q = _read(stored, fmt, shape[1])
        zero = None if fmt.symmetric else _zeros(stored["scale"], stored["bias"], fmt.bits)
        return ct.write(replace(q, params=replace(q.params, zero=zero)), None, None, dtype)

    kept = Kept(weights=fmt, activations=None, specs=ct.specs(fmt, None, shape, dtype), make=make)
    if fmt.symmetric:
        return kept
    symmetric = _kept(replace(FORMATS[f"int{fmt.bits}"], group=fmt.group), shape, parts)
    return replace(kept, doubt=partial(_doubt, bits=fmt.bits, symmetric=symmetric))


def _doubt(read: Callable[[str], Tensor], bits: int, symmetric: Kept) -> str | Kept | None:
    try:
        zero = _zeros(read("scale"), read("bias"), bits)
    except ValueError as error:
        return str(error)
    return None if bool(zero.any()) else symmetric


def _zeros(scale: Tensor, bias: Tensor, bits: int) -> Tensor:
    """int8 [out, groups]: signed zero points. Raises ValueError where a bias is no zero point times its scale."""
    import torch

    wide, exact = scale.to(torch.float64), -bias.to(torch.float64)
    zero = (exact / wide).round().nan_to_num(-1, -1, -1)
    if wrong := int(((zero * wide != exact) | (zero < 0) | (zero >= 1 << bits)).sum()):
        raise ValueError(
            f"{wrong} of its {bias.numel()} biases are no zero point from 0 to {(1 << bits) - 1} times their scale, and "
            "integers of other layouts have zero points"
        )
    return (zero - (1 << (bits - 1))).to(torch.int8)
