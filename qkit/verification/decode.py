"""The second decoder: from the bytes of a packed checkpoint to float32 weights, in numpy alone.

It shares nothing with the writer; the layouts are those of compressed-tensors 0.20 (files on disk), so that two
programs written apart have to agree on every weight. Arithmetic is IEEE float32, as the formats define it:
  integers   (code - zero) * scale
  FP8, MX    value * scale, an E8M0 scale being 2^(e - 127); NVFP4: value * (scale / global_scale)
  sparse     plus, at the places of the sparse part (CSR), a 16-bit value
The low-rank part is a product that runs beside the weight: its tensors are checked, and are no part of what is decoded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from qkit.errors import BadCheckpoint
from qkit.verification.record import RecordedLinear
from qkit.verification.spec import Spec
from qkit.verification.strict_json import parse_json

Array = npt.NDArray[Any]
CHUNK = 1 << 22  # elements decoded at a time
_BLOCK = 1 << 22  # bytes read at a time
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "|u1", "F8_E5M2": "|u1", "F8_E8M0": "|u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
    "BOOL": "|u1",
}  # fmt: skip
# dtype -> (unsigned view, exponent bits): not finite when all of them are set
_EXPONENT = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("|u1", 0x7C),
    "F8_E4M3": ("|u1", 0x7F),  # E4M3 (fn) has no infinity and one NaN
}
FLOATS = ("BF16", "F16", "F32")
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
E2M1 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])


def _e4m3_table() -> Array:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    magnitude[(code & 0x7F) == 0x7F] = np.nan
    signed: Array = np.where(code >= 128, -magnitude, magnitude)
    return signed.astype(np.float32)


E4M3 = _e4m3_table()
E8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.nan).astype(np.float32)


# --- stored tensors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: ``start`` and ``size`` are in bytes from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a few MB at a time. Raises BadCheckpoint when the file ends early."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            remaining = self.size
            while remaining:
                block = file.read(min(remaining, _BLOCK))
                if not block:
                    raise BadCheckpoint(f"{self.path.name}: ends {remaining} bytes early; export the checkpoint again")
                remaining -= len(block)
                yield block

    def array(self) -> Array:
        """The stored numbers; BF16 and FP8 as their bit patterns."""
        return np.frombuffer(b"".join(self.chunks()), dtype=_NUMPY[self.dtype]).reshape(self.shape)

    def float32(self) -> Array:
        """The values, exactly, of a tensor of type BF16, F16, F32 or F8_E4M3."""
        raw = self.array()
        if self.dtype == "BF16":
            return (raw.astype("<u4") << 16).view("<f4")
        return E4M3[raw] if self.dtype == "F8_E4M3" else raw.astype(np.float32)

    def sha256(self) -> str:
        """The sha256 of the bytes, in hex."""
        digest = hashlib.sha256()
        for block in self.chunks():
            digest.update(block)
        return digest.hexdigest()

    def nonfinite(self) -> int:
        """The number of values that are NaN or infinite (0 for integers)."""
        if self.dtype not in _EXPONENT:
            return 0
        view, mask = _EXPONENT[self.dtype]
        arrays = (np.frombuffer(block, dtype=view) for block in self.chunks())
        return sum(int(np.count_nonzero((a & a.dtype.type(mask)) == mask)) for a in arrays)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    The library checks offsets, sizes and dtypes against the file; this adds its two blind spots, duplicate names and
    names that are empty or hold control characters. Raises BadCheckpoint.
    """
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{path.name}: not a sound safetensors file ({error}); export the checkpoint again"
        ) from None
    header.pop("__metadata__", None)
    odd = next((name for name in header if not name.isprintable() or not name or len(name) > 1000), None)
    if odd is not None:
        raise BadCheckpoint(f"{path.name}: the tensor name {odd[:60]!r} is not acceptable; export the checkpoint again")
    unread = next((name for name, entry in header.items() if entry["dtype"] not in _NUMPY), None)
    if unread is not None:
        raise BadCheckpoint(f"{path.name}: {unread} has the dtype {header[unread]['dtype']}, which qkit never writes")
    return {
        name: StoredTensor(
            path, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0], _span(e["data_offsets"])
        )
        for name, e in header.items()
    }


def _span(offsets: list[int]) -> int:
    return offsets[1] - offsets[0]


def file_sha256(path: Path) -> str:
    """sha256 of a whole file."""
    return StoredTensor(path, "U8", (), 0, path.stat().st_size).sha256()


# --- layout -------------------------------------------------------------------------------------------------------

Expected = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]  # tensor suffix -> (allowed dtypes, shape)


def scale_shape(spec: Spec, shape: tuple[int, int]) -> tuple[int, ...]:
    """Shape of ``weight_scale`` for a weight of ``shape`` = (out, in)."""
    rows, columns = shape
    if spec.strategy == "tensor":
        return (1,)
    if spec.block:
        return math.ceil(rows / spec.block[0]), math.ceil(columns / spec.block[1])
    return rows, columns // spec.group if spec.group else 1


def layout(linear: RecordedLinear, packing: str, floats: tuple[str, ...] = FLOATS) -> Expected:
    """The tensors of ``linear`` in ``packing``, with the dtypes and the shape each must have.

    ``floats`` are the dtypes allowed for scales kept in the type of the model.
    """
    spec, (rows, columns) = linear.format, linear.shape
    grid = scale_shape(spec, linear.shape)
    packed = packing == "pack-quantized"
    scale = {"e4m3": ("F8_E4M3",), "e8m0": ("U8",)}.get(spec.scale, floats)
    tensors: Expected = {"weight_scale": (scale, grid)}
    if packed:
        tensors["weight_packed"] = (("I32",), (rows, math.ceil(columns * spec.bits / 32)))
        tensors["weight_shape"] = (("I64",), (2,))
    elif spec.kind == "fp4":
        tensors["weight_packed"] = (("U8",), (rows, columns // 2))
    else:
        tensors["weight"] = (("I8",) if spec.kind == "int" else ("F8_E4M3",), (rows, columns))
    if not spec.symmetric:
        along_rows = packed and spec.strategy != "tensor"
        down = (math.ceil(rows * spec.bits / 32), grid[-1])
        tensors["weight_zero_point"] = (("I32",), down) if along_rows else (("I8",), grid)
    if spec.strategy == "tensor_group":
        tensors["weight_global_scale"] = (("F32",), (1,))
    acts = linear.activations
    if acts and acts.strategy == "tensor_group":
        tensors["input_global_scale"] = (("F32",), (1,))
    elif acts and not acts.dynamic:
        tensors["input_scale"] = (floats, (1,))
        if not acts.symmetric:
            tensors["input_zero_point"] = (("I8",), (1,))
    if linear.sparse:
        index = "U8" if columns <= 256 else "U16" if columns <= 65536 else "I32"
        tensors["sparse_rows"] = (("U16" if linear.sparse < 65536 else "I32",), (rows + 1,))
        tensors["sparse_columns"] = ((index,), (linear.sparse,))
        tensors["sparse_values"] = (("BF16", "F16"), (linear.sparse,))
    if linear.rank:
        tensors["low_rank_down"] = (("BF16", "F16"), (linear.rank, columns))
        tensors["low_rank_up"] = (("BF16", "F16"), (rows, linear.rank))
    return tensors


# --- codes --------------------------------------------------------------------------------------------------------


def unpack_words(words: Array, bits: int, count: int) -> Array:
    """uint8 [rows, count] from int32 words [rows, n]: code i of a row is its bits i*bits .. (i+1)*bits-1, LSB first."""
    rows = words.shape[0]
    words = np.ascontiguousarray(words).view("<u4")
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        raw, per_byte = words.view(np.uint8), 8 // bits
        codes = np.empty((*raw.shape, per_byte), dtype=np.uint8)
        for i in range(per_byte):
            np.bitwise_and(raw >> np.uint8(i * bits), np.uint8(mask), out=codes[..., i])
        return codes.reshape(rows, -1)[:, :count]
    words = np.pad(words, ((0, 0), (0, -words.shape[1] % bits))).reshape(rows, -1, bits)  # 32 codes fill `bits` words
    codes = np.empty((*words.shape[:2], 32), dtype=np.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        part = words[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            part |= words[..., word + 1] << np.uint32(32 - shift)
        codes[..., i] = part & np.uint32(mask)
    return codes.reshape(rows, -1)[:, :count]


def padding_used(words: Array, bits: int, count: int) -> bool:
    """Whether a bit after the last of ``count`` codes is set in any row; writers leave them zero."""
    used = count * bits % 32
    return bool(used and np.any(words[:, -1].view("<u4") >> np.uint32(used)))


def _spread(operation: Callable[..., Any], values: Array, grid: Array, width: int) -> None:
    """In place ``values[r, c] = operation(values[r, c], grid[r, c // width])``."""
    rows, columns = values.shape
    if grid.shape[1] * width == columns:
        view = values.reshape(rows, -1, width)
        operation(view, grid[:, :, None], out=view)
    else:
        operation(values, np.repeat(grid, width, axis=1)[:, :columns], out=values)


# --- one linear ---------------------------------------------------------------------------------------------------


@dataclass
class DecodedLinear:
    """What one linear holds. ``faults``: (suffix, message); ``scalars``: of one-element scales; ``head``: the first values."""

    HEAD: ClassVar[int] = 256
    sha256: str = ""
    head: Array = field(default_factory=lambda: np.empty(0, np.float32))
    faults: list[tuple[str, str]] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)


def _check_scales(name: str, values: Array, result: DecodedLinear, signed: bool = False) -> None:
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    low = int(np.count_nonzero(values == 0 if signed else values <= 0))
    if bad:
        result.faults.append((name, f"{bad} of {values.size} values are NaN or infinite"))
    if low:
        fault = "zero, expected scales below or above 0" if signed else "zero or negative, expected scales above 0"
        result.faults.append((name, f"{low} of {values.size} values are {fault}"))


def _scales(linear: RecordedLinear, tensors: Mapping[str, StoredTensor], result: DecodedLinear) -> Array:
    """float32 [rows or 1, k]: what each code is multiplied by. Checks every scale of the linear on the way."""
    stored = tensors["weight_scale"]
    scale: Array = E8M0[stored.array()] if linear.format.scale == "e8m0" else stored.float32()
    integers = linear.format.kind == "int" and linear.format.symmetric  # a negative scale turns their range round
    _check_scales("weight_scale", scale, result, signed=integers)
    for name in ("weight_global_scale", "input_global_scale", "input_scale"):
        if name in tensors:
            value = tensors[name].float32()
            result.scalars[name] = float(value[0])
            _check_scales(name, value, result)
    if linear.format.strategy == "tensor":
        result.scalars["weight_scale"] = float(scale[0])
    if "weight_global_scale" in tensors:
        with np.errstate(all="ignore"):
            scale = scale / tensors["weight_global_scale"].float32()
    return scale.reshape(1, 1) if scale.ndim == 1 else scale


def _zeros(linear: RecordedLinear, tensors: Mapping[str, StoredTensor], result: DecodedLinear) -> Array:
    """float32 zero points in the shape of the scales."""
    spec, stored = linear.format, tensors["weight_zero_point"]
    raw, half = stored.array(), 1 << (spec.bits - 1)
    if stored.dtype == "I32":
        words = np.ascontiguousarray(raw.T)
        if padding_used(words, spec.bits, linear.shape[0]):
            result.faults.append(("weight_zero_point", "bits after the last zero point are set, expected 0"))
        return unpack_words(words, spec.bits, linear.shape[0]).T.astype(np.float32) - np.float32(half)
    if raw.size and (raw.min() < -half or raw.max() >= half):
        result.faults.append(("weight_zero_point", f"outside [{-half}, {half - 1}]"))
    return raw.astype(np.float32).reshape(1, 1) if raw.ndim == 1 else raw.astype(np.float32)


def _values(spec: Spec, packed: Array, columns: int, faults: set[tuple[str, str]]) -> Array:
    """float32 [rows, columns]: the numbers that the codes of some rows stand for, before zero point and scale."""
    half = 1 << (spec.bits - 1)
    if spec.kind == "fp4":
        nibbles = np.stack((packed & 15, packed >> 4), axis=-1)  # the even column is the low nibble
        return E2M1[nibbles.reshape(packed.shape[0], columns)]
    if spec.kind == "fp8":
        if np.any((packed & 0x7F) == 0x7F):
            faults.add(("weight", "holds NaN codes"))
        return E4M3[packed]
    if packed.dtype == np.int8:
        if packed.min() < -half or packed.max() >= half:
            faults.add(("weight", f"codes are outside [{-half}, {half - 1}] of {spec.bits} bits"))
        return packed.astype(np.float32)
    if padding_used(packed, spec.bits, columns):
        faults.add(("weight_packed", "bits after the last code of a row are set, expected 0"))
    values: Array = unpack_words(packed, spec.bits, columns).astype(np.float32)
    values -= np.float32(half)
    return values


@dataclass(frozen=True)
class _Sparse:
    """starts: int64 [rows + 1]; columns: int64 [n]; values: float32 [n]"""

    starts: Array
    columns: Array
    values: Array

    def add(self, values: Array, first: int) -> None:
        """Adds the sparse part to rows ``first`` and on of the weight, in place, in float32."""
        rows = np.repeat(np.arange(len(values)), np.diff(self.starts[first : first + len(values) + 1]))
        span = slice(self.starts[first], self.starts[first + len(values)])
        values[rows, self.columns[span]] += self.values[span]


def _sparse(linear: RecordedLinear, tensors: Mapping[str, StoredTensor], result: DecodedLinear) -> _Sparse | None:
    """The sparse part; None, with faults, where it is not a sound CSR matrix."""
    starts, columns = (tensors[f"sparse_{name}"].array().astype(np.int64) for name in ("rows", "columns"))
    values, faults_before = tensors["sparse_values"].float32(), len(result.faults)
    if starts[0] != 0 or starts[-1] != len(columns) or np.any(np.diff(starts) < 0):
        result.faults.append(("sparse_rows", f"expected pointers that rise from 0 to {len(columns)}"))
        return None
    inside = np.ones(len(columns), dtype=bool)
    inside[starts[:-1][starts[:-1] < len(columns)]] = False  # the first of a row may be smaller than the one before
    if np.any(columns < 0) or np.any(columns >= linear.shape[1]) or np.any(np.diff(columns)[inside[1:]] <= 0):
        result.faults.append(("sparse_columns", f"expected numbers below {linear.shape[1]} that rise within a row"))
    bad = int(values.size - np.count_nonzero(np.isfinite(values) & (values != 0)))
    if bad:
        result.faults.append(("sparse_values", f"{bad} of {values.size} values are zero, NaN or infinite"))
    return _Sparse(starts, columns, values) if len(result.faults) == faults_before else None


def decode(linear: RecordedLinear, tensors: Mapping[str, StoredTensor]) -> DecodedLinear:
    """The decoded weight of a linear whose ``tensors`` have the dtypes and shapes of ``layout``; a few rows at a time.

    The hash is of the float32 weight, little-endian, row-major [out, in]."""
    result, spec, (rows, columns) = DecodedLinear(), linear.format, linear.shape
    if "weight_shape" in tensors and tuple(tensors["weight_shape"].array().tolist()) != linear.shape:
        stored_shape = tensors["weight_shape"].array().tolist()
        result.faults.append(("weight_shape", f"holds {stored_shape}, expected {list(linear.shape)}"))
    scale = _scales(linear, tensors, result)
    zero = None if spec.symmetric else _zeros(linear, tensors, result)
    codes = tensors["weight_packed" if "weight_packed" in tensors else "weight"].array()
    added = _sparse(linear, tensors, result) if linear.sparse else None
    for name in ("low_rank_down", "low_rank_up") if linear.rank else ():
        bad = tensors[name].nonfinite()
        if bad:
            result.faults.append((name, f"{bad} values are NaN or infinite"))
    height, width = spec.block or (1, spec.group or columns)
    digest, faults, overflow = hashlib.sha256(), set[tuple[str, str]](), 0
    step = max(1, CHUNK // columns)
    with np.errstate(all="ignore"):
        for first in range(0, rows, step):
            part = codes[first : first + step]
            scale_rows = np.arange(first, first + part.shape[0]) // height if scale.shape[0] > 1 else slice(None)
            values = _values(spec, part, columns, faults)
            if zero is not None:
                _spread(np.subtract, values, zero[scale_rows], width)
            _spread(np.multiply, values, scale[scale_rows], width)
            if added is not None:
                added.add(values, first)
            overflow += values.size - int(np.count_nonzero(np.isfinite(values)))
            digest.update(np.ascontiguousarray(values, dtype="<f4").data)
            result.head = result.head if first else values[0, : result.HEAD].copy()
    result.faults.extend(sorted(faults))
    if overflow and not result.faults:
        result.faults.append(("weight_scale", f"{overflow} decoded weights are NaN or infinite"))
    result.sha256 = digest.hexdigest()
    return result
