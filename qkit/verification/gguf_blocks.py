"""The second decoder of GGUF: from the bytes of blocks to float32, in numpy alone, after ggml's ``block_*`` structures.

Part of the independent proof (see ``verify.py``): nothing here comes from the code that packs blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_NL4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
# Columns and bytes of a block, by the number that a GGUF file has for the type.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip


def decode_blocks(kind: str, rows: Array, columns: int) -> Array:
    """float32 [rows, columns] of uint8 [rows, bytes of a row]."""
    size = next(s for name, _, s in TYPES.values() if name == kind)
    if kind in ("F32", "F16", "BF16"):
        if kind == "BF16":
            return (np.ascontiguousarray(rows).view("<u2").astype("<u4") << 16).view("<f4")
        return np.ascontiguousarray(rows).view({"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32)
    blocks = np.ascontiguousarray(rows).reshape(-1, size)
    return _DECODERS[kind](blocks).reshape(len(rows), columns)


def _f16(raw: Array) -> Array:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _bit(raw: Array, count: int) -> Array:
    """Bits of bytes, the lowest first: [N, bytes] -> [N, count]."""
    return np.unpackbits(raw, axis=1, bitorder="little")[:, :count]


def _nibbles(raw: Array, width: int) -> Array:
    """Of every ``width`` bytes the low halves, then the high ones."""
    parts = raw.reshape(len(raw), -1, width)
    return np.stack([parts & 15, parts >> 4], axis=2).reshape(len(raw), -1)


def _crumbs(raw: Array) -> Array:
    """Of every 32 bytes the lowest two bits, then the next ones."""
    parts = raw.reshape(len(raw), -1, 32)
    return np.stack([parts >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(len(raw), -1)


def _planes(raw: Array) -> Array:
    """Of 32 bytes all lowest bits, then all second ones .. as 256 numbers."""
    return np.stack([raw >> shift & 1 for shift in range(8)], axis=1).reshape(len(raw), -1)


def _scaled(scale: Array, codes: Array, minimum: Array | None = None) -> Array:
    """scale [N, groups] times codes [N, columns], less minimum [N, groups]."""
    values: Array = codes.astype(np.float32).reshape(*scale.shape, -1) * scale[..., None]
    return values if minimum is None else values - minimum[..., None]


def _q8_0(b: Array) -> Array:
    return _scaled(_f16(b[:, :2]), b[:, 2:].view(np.int8))


def _q4_0(b: Array) -> Array:
    return _scaled(_f16(b[:, :2]), _nibbles(b[:, 2:], 16).astype(np.int16) - 8)


def _q4_1(b: Array) -> Array:
    return _scaled(_f16(b[:, :2]), _nibbles(b[:, 4:], 16), -_f16(b[:, 2:4]))


def _q5_0(b: Array) -> Array:
    codes = _nibbles(b[:, 6:], 16).astype(np.int16) + 16 * _bit(b[:, 2:6], 32).astype(np.int16) - 16
    return _scaled(_f16(b[:, :2]), codes)


def _q5_1(b: Array) -> Array:
    return _scaled(_f16(b[:, :2]), _nibbles(b[:, 8:], 16) + 16 * _bit(b[:, 4:8], 32), -_f16(b[:, 2:4]))


def _iq4_nl(b: Array) -> Array:
    return _scaled(_f16(b[:, :2]), _NL4[_nibbles(b[:, 2:], 16)])


def _iq4_xs(b: Array) -> Array:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2")
    upper = np.concatenate([high >> shift & 3 for shift in range(0, 16, 2)], axis=1)
    lower = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(len(b), 8)
    scale = (lower.astype(np.int16) + 16 * upper.astype(np.int16) - 32).astype(np.float32)
    return _scaled(_f16(b[:, :2]) * scale, _NL4[_nibbles(b[:, 8:], 16)])


def _q2_k(b: Array) -> Array:
    scale, minimum = (b[:, :16] & 15).astype(np.float32), (b[:, :16] >> 4).astype(np.float32)
    return _scaled(_f16(b[:, 80:82]) * scale, _crumbs(b[:, 16:80]), _f16(b[:, 82:84]) * minimum)


def _q3_k(b: Array) -> Array:
    low, high = b[:, 96:104], b[:, 104:108]
    lower = np.concatenate([low & 15, low >> 4], axis=1)
    upper = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = (lower.astype(np.int16) + 16 * upper.astype(np.int16) - 32).astype(np.float32)
    codes = _crumbs(b[:, 32:96]).astype(np.int16) + 4 * _planes(b[:, :32]).astype(np.int16) - 4
    return _scaled(_f16(b[:, 108:110]) * scale, codes)


def _six_bits(b: Array) -> tuple[Array, Array]:
    """Eight scales and eight minima of 12 bytes."""
    first, second, rest = b[:, :4], b[:, 4:8], b[:, 8:12]
    scale = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=1)
    minimum = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _q4_k(b: Array) -> Array:
    scale, minimum = _six_bits(b[:, 4:16])
    return _scaled(_f16(b[:, :2]) * scale, _nibbles(b[:, 16:], 32), _f16(b[:, 2:4]) * minimum)


def _q5_k(b: Array) -> Array:
    scale, minimum = _six_bits(b[:, 4:16])
    codes = _nibbles(b[:, 48:], 32) + 16 * _planes(b[:, 16:48])
    return _scaled(_f16(b[:, :2]) * scale, codes, _f16(b[:, 2:4]) * minimum)


def _q6_k(b: Array) -> Array:
    codes = _nibbles(b[:, :128], 64).astype(np.int16) + 16 * _crumbs(b[:, 128:192]).astype(np.int16) - 32
    return _scaled(_f16(b[:, 208:210]) * b[:, 192:208].view(np.int8).astype(np.float32), codes)


def _mxfp4(b: Array) -> Array:
    return _scaled(np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 127), _FP4[_nibbles(b[:, 1:], 16)])


def _nvfp4(b: Array) -> Array:
    exponent, fraction = (b[:, :4] >> 3 & 15).astype(np.int32), (b[:, :4] & 7).astype(np.float32)
    normal, small = np.ldexp(1 + fraction / 8, exponent - 7), fraction * np.float32(2**-9)
    scale = np.where(exponent == 0, small, normal)
    return _scaled(np.where(b[:, :4] == 127, 0, scale).astype(np.float32), _FP4[_nibbles(b[:, 4:], 8)])


_DECODERS: dict[str, Callable[[Array], Array]] = {
    "Q8_0": _q8_0, "Q5_0": _q5_0, "Q4_0": _q4_0, "Q5_1": _q5_1, "Q4_1": _q4_1, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "MXFP4": _mxfp4, "NVFP4": _nvfp4,
}  # fmt: skip
