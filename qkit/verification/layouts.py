"""The second decoder for GPTQ, AWQ, ModelOpt and MLX: which tensors a linear has in these layouts, and their float32 weight.

Part of the independent proof (see ``verify.py``), in numpy alone. What it makes of a linear are signed codes, zero points and
scales as compressed-tensors has them, so that the weight is formed by the same arithmetic: (code - zero) * scale, and for
NVFP4 value * (scale / global scale), of which ``weight_scale_2`` is the reciprocal. Of MLX, a bias is -zero * scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from qkit.verification.decode import (
    CHUNK,
    E2M1,
    E4M3,
    E8M0,
    FLOATS,
    Array,
    DecodedLinear,
    Expected,
    StoredTensor,
    decode,
    layout,
    scale_shape,
    unpack_words,
)
from qkit.verification.record import RecordedLinear

GPTQ, GPTQ_V2, AWQ, MODELOPT, MLX = "gptq", "gptq_v2", "awq", "modelopt", "mlx"
PACKINGS = (GPTQ, GPTQ_V2, AWQ, MODELOPT, MLX)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each half byte of a word holds, from the lowest on


def stored_layout(linear: RecordedLinear, packing: str, floats: tuple[str, ...] = FLOATS) -> Expected:
    """The tensors of ``linear`` in ``packing``, as ``decode.layout``."""
    if packing not in PACKINGS:
        return layout(linear, packing, floats)
    spec, (rows, columns) = linear.format, linear.shape
    groups = scale_shape(spec, linear.shape)[-1]
    if packing == MODELOPT:
        return _modelopt(linear)
    if packing == MLX:
        return _mlx(linear)
    scales: Expected = {"scales": (("BF16", "F16"), (groups, rows))}
    if packing == AWQ:
        return {"qweight": (("I32",), (columns, rows // 8)), "qzeros": (("I32",), (groups, rows // 8)), **scales}
    return {
        "qweight": (("I32",), (columns * spec.bits // 32, rows)),
        "qzeros": (("I32",), (groups, rows * spec.bits // 32)),
        "g_idx": (("I32",), (columns,)),
        **scales,
    }


def _modelopt(linear: RecordedLinear) -> Expected:
    spec, (rows, columns) = linear.format, linear.shape
    grid = scale_shape(spec, linear.shape)
    if spec.kind == "fp4":
        found: Expected = {"weight": (("U8",), (rows, columns // 2)), "weight_scale": (("F8_E4M3",), grid)}
        found["weight_scale_2"] = (("F32",), ())
    else:
        shapes = {"tensor": (), "channel": (rows,), "block": (grid[0], 1, grid[-1], 1)}
        scale = (("U8",), grid) if spec.scale == "e8m0" else (("F32",), shapes.get(spec.strategy, grid))
        found = {"weight": (("F8_E4M3",), (rows, columns)), "weight_scale": scale}
    if linear.activations is not None and not (linear.activations.dynamic and linear.activations.scale != "e4m3"):
        found["input_scale"] = (("F32",), ())
    return found


def _mlx(linear: RecordedLinear) -> Expected:
    spec, (rows, columns) = linear.format, linear.shape
    grid, floats = scale_shape(spec, linear.shape), ("BF16", "F16", "F32")
    words: Expected = {"weight": (("U32",), (rows, columns * spec.bits // 32))}
    if spec.kind != "int":
        return {**words, "scales": (("U8",), grid)}
    return {**words, "scales": (floats, grid), "biases": (floats, grid)}


def decode_stored(linear: RecordedLinear, tensors: Mapping[str, StoredTensor], packing: str) -> DecodedLinear:
    """The decoded weight of a linear whose ``tensors`` have the dtypes and shapes of ``stored_layout``."""
    if packing not in PACKINGS:
        return decode(linear, tensors)
    result = DecodedLinear()
    if packing == MODELOPT:
        values, scale = _floats(linear, tensors, result)
        _finish(result, linear, values, None, scale)
        return result
    if packing == MLX and linear.format.kind != "int":
        _finish(result, linear, _micro_values(linear, tensors, result), None, E8M0[tensors["scales"].array()])
        return result
    unpack = {AWQ: _awq, MLX: _affine}.get(packing, _gptq)
    codes, zero, scale = unpack(linear, tensors, packing, result)
    if linear.format.symmetric and zero.any():
        name = "biases" if packing == MLX else "qzeros"
        result.faults.append((name, f"{int(np.count_nonzero(zero))} zero points of a symmetric weight are not 0"))
    _check(result, "scales", scale, signed=linear.format.symmetric)
    _finish(result, linear, codes, zero, scale)
    return result


def _gptq(
    linear: RecordedLinear, tensors: Mapping[str, StoredTensor], packing: str, result: DecodedLinear
) -> tuple[Array, Array, Array]:
    """Signed codes [out, in], zero points and scales [out, groups]."""
    bits, (rows, columns) = linear.format.bits, linear.shape
    half, scale = 1 << (bits - 1), tensors["scales"].float32().T
    codes = unpack_words(np.ascontiguousarray(tensors["qweight"].array().T), bits, columns).astype(np.int16) - half
    zero = unpack_words(tensors["qzeros"].array(), bits, rows).astype(np.int16)
    if packing == GPTQ:
        zero = (zero + 1) & ((1 << bits) - 1)
    expected = np.arange(columns) // (columns // scale.shape[1])
    if not np.array_equal(tensors["g_idx"].array(), expected):
        result.faults.append(("g_idx", "groups do not follow each other, which they do in files of qkit"))
    return codes, zero.T - half, scale


def _awq(
    linear: RecordedLinear, tensors: Mapping[str, StoredTensor], packing: str, result: DecodedLinear
) -> tuple[Array, Array, Array]:
    def lanes(words: Array) -> Array:
        unsigned = np.ascontiguousarray(words).view("<u4")
        found = np.empty((*unsigned.shape, 8), dtype=np.int16)
        for place, output in enumerate(_AWQ_ORDER):
            found[..., output] = (unsigned >> np.uint32(4 * place)) & np.uint32(15)
        return found.reshape(words.shape[0], -1).T - 8

    codes, zero = lanes(tensors["qweight"].array()), lanes(tensors["qzeros"].array())
    return codes, zero, tensors["scales"].float32().T


def _affine(
    linear: RecordedLinear, tensors: Mapping[str, StoredTensor], packing: str, result: DecodedLinear
) -> tuple[Array, Array, Array]:
    """MLX's code * scale + bias: the bias has to be a whole multiple of the scale exactly, and so is a zero point."""
    bits, scale, bias = linear.format.bits, tensors["scales"].float32(), tensors["biases"].float32()
    half, wide = 1 << (bits - 1), scale.astype(np.float64)
    stream = np.unpackbits(tensors["weight"].array().astype("<u4").view(np.uint8), axis=1, bitorder="little")
    lanes = stream.reshape(linear.shape[0], linear.shape[1], bits).astype(np.int16)
    codes = lanes @ (1 << np.arange(bits, dtype=np.int16))
    with np.errstate(all="ignore"):
        zero = np.nan_to_num(np.rint(-bias / wide), posinf=-1, neginf=-1)
    wrong = (zero * wide != -bias.astype(np.float64)) | (zero < 0) | (zero >= 1 << bits)
    if count := int(np.count_nonzero(wrong)):
        fault = f"{count} of {bias.size} are no zero point from 0 to {(1 << bits) - 1} times the scale"
        result.faults.append(("biases", fault))
    return codes - half, np.where(wrong, half, zero).astype(np.int16) - half, scale


def _micro_values(linear: RecordedLinear, tensors: Mapping[str, StoredTensor], result: DecodedLinear) -> Array:
    """Values [out, in] of MLX's MXFP4 and MXFP8, whose bytes lie four to a word."""
    data = tensors["weight"].array().astype("<u4").view(np.uint8)
    _check(result, "scales", E8M0[tensors["scales"].array()])
    if linear.format.kind == "fp4":
        return E2M1[np.stack((data & 15, data >> 4), axis=-1).reshape(linear.shape)]
    if np.any((data & 0x7F) == 0x7F):
        result.faults.append(("weight", "holds NaN codes"))
    return E4M3[data]


def _floats(linear: RecordedLinear, tensors: Mapping[str, StoredTensor], result: DecodedLinear) -> tuple[Array, Array]:
    """Values of the codes [out, in], and scales [rows, columns] of them, of NVFP4, FP8 and MXFP8."""
    spec, raw = linear.format, tensors["weight"].array()
    if spec.kind == "fp4":
        values = E2M1[np.stack((raw & 15, raw >> 4), axis=-1).reshape(linear.shape)]
    else:
        values = E4M3[raw]
        if np.any((raw & 0x7F) == 0x7F):
            result.faults.append(("weight", "holds NaN codes"))
    stored = tensors["weight_scale"]
    scale = E8M0[stored.array()] if spec.scale == "e8m0" else stored.float32()
    _check(result, "weight_scale", scale)
    if spec.strategy == "tensor":
        result.scalars["weight_scale"] = float(scale)
    for name in ("weight_scale_2", "input_scale"):
        if name in tensors:
            value = tensors[name].float32()
            result.scalars[name] = float(value)
            _check(result, name, value)
    if spec.kind == "fp4":
        with np.errstate(all="ignore"):
            scale = scale / _whose_reciprocal(tensors["weight_scale_2"].float32())
    grid = (1, 1) if spec.strategy == "tensor" else scale_shape(spec, linear.shape)
    return values, scale.reshape(grid)


def _whose_reciprocal(stored: Array) -> np.float32:
    """The number of which a stored one is the reciprocal. Several may be, once rounded to float32: one that ends with 12 zero
    bits is taken first, then 1 / a * 2688 for a magnitude a that float16 has, then the nearest."""
    one, value = np.float32(1), np.float32(stored.reshape(()))
    near = one / value
    around = (near.view("<i4") + np.array([0, 1, -1, 2, -2], dtype="<i4")).view("<f4")
    whole = np.float32(2688)
    with np.errstate(all="ignore"):
        largest = one / np.float32(np.float16(value * whole)) * whole

    def zeros(x: np.float32) -> int:
        mantissa = int(x.view("<i4")) & 0x7FFFFF
        return 23 if mantissa == 0 else len(bin(mantissa)) - len(bin(mantissa).rstrip("0"))

    short = [x for x in (*around, largest) if one / x == value and zeros(x) >= 12]
    if short:
        return max(short, key=zeros)
    return largest if one / largest == value else near


def _check(result: DecodedLinear, name: str, values: Array, signed: bool = False) -> None:
    bad = int(np.count_nonzero(~np.isfinite(values) | (values == 0 if signed else values <= 0)))
    if bad:
        expected = "finite and not 0" if signed else "finite and above 0"
        result.faults.append((name, f"{bad} of {values.size} values are not {expected}"))


def _finish(result: DecodedLinear, linear: RecordedLinear, codes: Array, zero: Array | None, scale: Array) -> None:
    """Hashes (code - zero) * scale in float32, some rows at a time."""
    rows, columns = linear.shape
    height = linear.format.block[0] if linear.format.block else 1
    width = -(-columns // scale.shape[1]) if not linear.format.block else linear.format.block[1]
    digest, column_of, overflow = hashlib.sha256(), np.arange(columns) // width, 0
    for first in range(0, rows, max(1, CHUNK // columns)):
        last = min(rows, first + max(1, CHUNK // columns))
        row_of = np.arange(first, last) // height if scale.shape[0] > 1 else np.zeros(last - first, dtype=np.int64)
        values = codes[first:last].astype(np.float32)
        if zero is not None:
            values -= zero[row_of][:, column_of].astype(np.float32)
        with np.errstate(all="ignore"):
            values *= scale[row_of][:, column_of]
        overflow += values.size - int(np.count_nonzero(np.isfinite(values)))
        digest.update(np.ascontiguousarray(values, dtype="<f4").data)
        result.head = result.head if first else values[0, : result.HEAD].copy()
    if overflow and not result.faults:
        result.faults.append(("scales", f"{overflow} decoded weights are NaN or infinite"))
    result.sha256 = digest.hexdigest()
