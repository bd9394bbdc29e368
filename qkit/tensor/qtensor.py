"""Quantized tensors in plain torch: the reference for every kernel, solver and exporter.

Three steps, each a pure function:
  ``find_params``  float weight -> Params (scale, zero point, global scale), by range or by a search
  ``quantize``     float weight and Params -> QTensor (codes)
  ``dequantize``   QTensor -> float weight, the exact value that a loader of the packed file computes

Elements that share a scale are seen as one axis: ``tiles`` turns a weight [out, in] into [R, C, n] where
the scale is [R, C] (group: [out, in/g, g]; channel: [out, 1, in]; tensor: [1, 1, out*in]; block:
[out/128, in/128, 128*128], padded with zeros). Scales are kept in the dtype that goes to disk, so an error
measured here contains the rounding of the scale.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.errors import Unsupported
from qkit.tensor import lowrank, sparse
from qkit.tensor.formats import FP4_MAX, FP8_MAX, NVFP4_RANGE, Format
from qkit.tensor.lowrank import LowRank
from qkit.tensor.sparse import Sparse

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes by code; bit 3 of a code is the sign
_SEARCH_ELEMENTS = 1 << 16  # of a weight, held by one step of the scale search: its buffers stay in the L2 cache


@dataclass(frozen=True)
class Params:
    """Parameters of a quantized weight.

    scale: [R, C] in its dtype on disk (model dtype, float8_e4m3fn, or uint8 E8M0 exponents)
    zero: int8 [R, C] for asymmetric integers; global_scale: float32 [1] for NVFP4
    """

    scale: Tensor
    zero: Tensor | None = None
    global_scale: Tensor | None = None


@dataclass(frozen=True)
class QTensor:
    """A quantized weight [out, in].

    codes: int8 (integers), uint8 (E2M1 codes 0..15) or float8_e4m3fn, [out, in]
    sparse, low_rank: a few values and a product of thin matrices, which are added to the dequantized codes
    """

    codes: Tensor
    params: Params
    format: Format
    sparse: Sparse | None = None
    low_rank: LowRank | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]


def code_range(fmt: Format) -> tuple[float, float]:
    """Smallest and largest value of the code grid."""
    if fmt.kind == "int":
        return -(2.0 ** (fmt.bits - 1)), 2.0 ** (fmt.bits - 1) - 1
    return (-FP4_MAX, FP4_MAX) if fmt.kind == "fp4" else (-FP8_MAX, FP8_MAX)


def half_range(fmt: Format) -> float:
    """The divisor of amax in a symmetric scale: (2^b - 1) / 2 for integers, the largest value for floats."""
    return (2.0**fmt.bits - 1) / 2 if fmt.kind == "int" else code_range(fmt)[1]


def round_to_grid(x: Tensor, fmt: Format) -> Tensor:
    """The nearest value of the format's code grid (ties to even), in x's dtype. x: already divided by the scale."""
    return round_to_grid_(x.clone(), fmt)


def round_to_grid_(x: Tensor, fmt: Format) -> Tensor:
    """``round_to_grid`` in place."""
    low, high = code_range(fmt)
    x.clamp_(low, high)
    if fmt.kind == "int":
        return x.round_()
    if fmt.kind == "fp8":
        return x.copy_(x.to(torch.float8_e4m3fn))
    step = grid_spacing(x, fmt)
    return x.div_(step).round_().mul_(step)


def grid_spacing(x: Tensor, fmt: Format) -> Tensor:
    """Distance between neighbours on the code grid around x, in x's dtype; x: within the code range.

    For floats it is a power of two (x with its mantissa cleared) times one step of the mantissa, down to the subnormal numbers
    (E2M1: 0.5 below 2, 1 below 4, 2 above). Comparisons would give the same, but take twenty times as long.
    """
    if fmt.kind == "int":
        return torch.ones((), dtype=x.dtype)
    smallest, step = (1.0, 0.5) if fmt.kind == "fp4" else (2.0**-6, 2.0**-3)
    exponent = (x.to(torch.float32).view(torch.int32) & 0x7F800000).view(torch.float32)
    return exponent.clamp_(min=smallest).mul_(step).to(x.dtype)


# ---- tiles -----------------------------------------------------------------------------------------------------


def param_shape(fmt: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """[R, C]: the shape of the scale of a weight [out, in]."""
    out, columns = shape
    if fmt.strategy in ("group", "tensor_group"):
        assert fmt.group is not None
        if columns % fmt.group:
            raise Unsupported(f"format {fmt.name}: {columns} columns are not a multiple of the group size {fmt.group}")
        return out, columns // fmt.group
    if fmt.strategy == "block":
        assert fmt.block is not None
        return -(-out // fmt.block[0]), -(-columns // fmt.block[1])
    return (1, 1) if fmt.strategy == "tensor" else (out, 1)


def tiles(w: Tensor, fmt: Format) -> Tensor:
    """[out, in] -> [R, C, n]: the last axis shares a scale. A view where possible."""
    out, columns = w.shape
    if fmt.strategy == "tensor":
        return w.reshape(1, 1, -1)
    if fmt.strategy != "block":
        r, c = param_shape(fmt, (out, columns))
        return w.reshape(r, c, columns // c)
    assert fmt.block is not None
    (bh, bw), (r, c) = fmt.block, param_shape(fmt, (out, columns))
    padded = torch.nn.functional.pad(w, (0, c * bw - columns, 0, r * bh - out))
    return padded.reshape(r, bh, c, bw).transpose(1, 2).reshape(r, c, bh * bw)


def untile(t: Tensor, fmt: Format, shape: tuple[int, int]) -> Tensor:
    """[R, C, n] -> [out, in]: the inverse of ``tiles``."""
    if fmt.strategy != "block":
        return t.reshape(shape)
    assert fmt.block is not None
    (r, c), (bh, bw) = t.shape[:2], fmt.block
    return t.reshape(r, c, bh, bw).transpose(1, 2).reshape(r * bh, c * bw)[: shape[0], : shape[1]]


def expand(per_tile: Tensor, fmt: Format, shape: tuple[int, int], columns: slice = slice(None)) -> Tensor:
    """[R, C] -> a tensor that broadcasts against columns ``columns`` of [out, in] element by element."""
    out, all_columns = shape
    if fmt.strategy in ("tensor", "channel"):
        return per_tile
    width = fmt.group if fmt.group is not None else fmt.block[1]  # type: ignore[index]
    index = torch.arange(all_columns, device=per_tile.device)[columns] // width
    values = per_tile[:, index]
    if fmt.strategy == "block":
        assert fmt.block is not None
        values = values.repeat_interleave(fmt.block[0], dim=0)[:out]
    return values


# ---- scales ----------------------------------------------------------------------------------------------------


def effective_scale(p: Params, fmt: Format) -> Tensor:
    """Factors of codes, float32 [R, C]."""
    if fmt.scale == "e8m0":
        return torch.exp2(p.scale.to(torch.float32) - 127.0)
    scale = p.scale.to(torch.float32)
    return scale if p.global_scale is None else scale / p.global_scale


def nvfp4_global_scale(amax: Tensor) -> Tensor:
    """float32 [1]: 2688 / amax; 1 where that is not finite (all-zero tensor)."""
    limits = torch.finfo(torch.float32)
    largest = limits.max * (1 - 2.0**-20)  # room for the rounding of 6 * (448 / global scale)
    return torch.nan_to_num(
        NVFP4_RANGE / amax.to(torch.float32).clamp(limits.tiny, largest).reshape(1),
        nan=1.0,
        posinf=1.0,
    )


def shared_amax(weights: Sequence[Tensor], fmt: Format) -> Tensor | None:
    """The largest magnitude of weights that engines fuse, float32 [1], for formats in which fused weights share a scale.

    Shared are NVFP4's global scale and the only scale of a tensor. None for other formats, and for a single weight with one
    scale.
    """
    if fmt.scale != "e4m3" and (fmt.strategy != "tensor" or len(weights) == 1):
        return None
    return torch.stack([w.abs().amax() for w in weights]).amax().reshape(1)


def _store_scale(scale: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    """Round to the dtype on disk; a scale of zero (all-zero tile) becomes 1, an underflow the smallest normal.

    largest: what a scale is multiplied with at most. Where that would leave the dtype, the scale is cut (to a power of
    two below its largest value, so that no rounding lifts it again) and the code saturates.
    """
    limit = torch.finfo(dtype).max / 2.0 ** math.ceil(math.log2(largest))
    stored = scale.clamp_max(limit).to(dtype)
    stored = torch.where(stored == 0, torch.tensor(torch.finfo(dtype).tiny, dtype=dtype), stored)
    return torch.where(scale == 0, torch.ones((), dtype=dtype), stored)


def params_from_range(
    low: Tensor, high: Tensor, fmt: Format, dtype: torch.dtype, global_scale: Tensor | None = None
) -> Params:
    """Params of tiles whose values span [low, high], float32 [R, C] with low <= 0 <= high.

    dtype: the model's dtype, for formats that keep their scales in it.
    global_scale: float32 [1] for NVFP4.
    """
    amax = torch.maximum(-low, high)
    if fmt.scale == "e8m0":
        # The exponent of amax, rounded up when its mantissa is at least 1.75, less the exponent of the largest
        # code (2 for E2M1, 8 for E4M3).
        mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
        offset = 2 if fmt.kind == "fp4" else 8
        e = exponent - 1 + (mantissa >= 0.875).to(exponent.dtype) - offset
        e = torch.where(amax == 0, torch.zeros_like(e), e)
        highest = math.frexp(torch.finfo(dtype).max)[1] - 1 - offset  # beyond it the largest code leaves the dtype
        return Params((e + 127).clamp(0, 127 + highest).to(torch.uint8))
    if fmt.scale == "e4m3":
        assert global_scale is not None
        scale = (global_scale * (amax / half_range(fmt))).clamp_max(FP8_MAX).to(torch.float8_e4m3fn)
        smallest = torch.tensor(0.125).to(torch.float8_e4m3fn)  # what compressed-tensors stores for an empty group
        return Params(torch.where(scale.to(torch.float32) == 0, smallest, scale), None, global_scale)
    if fmt.symmetric:
        return Params(_store_scale(amax / half_range(fmt), dtype, -code_range(fmt)[0]))
    levels = 2.0**fmt.bits - 1
    scale = _store_scale(high / levels - low / levels, dtype, levels)
    qmin, qmax = code_range(fmt)
    zero = (qmin - low / scale.to(torch.float32)).round().clamp(qmin, qmax)
    return Params(scale, zero.to(torch.int8))


def _range(t: Tensor) -> tuple[Tensor, Tensor]:
    return t.amin(-1).clamp_max(0), t.amax(-1).clamp_min(0)


def find_params(
    w: Tensor,
    fmt: Format,
    dtype: torch.dtype,
    *,
    importance: Tensor | None = None,
    search: bool = False,
    amax: Tensor | None = None,
    signed: bool = False,
) -> Params:
    """Scales and zero points for a weight.

    w:            float32 [out, in], finite
    dtype:        the model's dtype, in which integer and FP8 scales are stored
    importance:   float32 [in], weight of each input column's squared error (mean x^2 is the natural choice)
    search:       try ranges from 45 % to 110 % of the full one and keep, for each tile, the one with the least
                  weighted squared error (our choice of grid); the full range is always a candidate
    amax:         float32 [1], largest magnitude of all linears that share NVFP4's global scale, or the only scale of a
                  tensor (which is then not searched); None: that of this weight
    signed:       scales of symmetric integers of up to 4 bits may be negative. Their codes reach one step further below
                  zero than above: a negative scale gives that step to the side where the tile's largest weight is
    """
    if signed and fmt.kind == "int" and fmt.symmetric and fmt.bits <= 4:
        t = tiles(w, fmt)
        sign = torch.where(t.amax(-1) > -t.amin(-1), -1.0, 1.0)
        signed_tiles = t * sign[..., None]
        if search:
            signed_weight = untile(signed_tiles, fmt, (w.shape[0], w.shape[1]))
            p = find_params(signed_weight, fmt, dtype, importance=importance, search=True)
        else:  # the largest weight becomes the lowest code
            low, high = (x * (1 - 2.0**-fmt.bits) for x in _range(signed_tiles))
            p = params_from_range(low, high, fmt, dtype)
        return Params(p.scale * sign.to(p.scale.dtype))
    if fmt.strategy == "tensor" and amax is not None:
        full_range = amax.reshape(1, 1)
        return params_from_range(-full_range, full_range, fmt, dtype)
    global_scale = nvfp4_global_scale(w.abs().amax() if amax is None else amax) if fmt.scale == "e4m3" else None
    if not search or fmt.strategy == "block":
        return params_from_range(*_range(tiles(w, fmt)), fmt, dtype, global_scale)
    if fmt.strategy == "tensor":
        return _search(tiles(w, fmt), None, fmt, dtype, global_scale)
    step = max(1, _SEARCH_ELEMENTS // w.shape[1])
    weights = None if importance is None else tiles(importance[None].to(torch.float32), fmt)
    params = [_search(tiles(rows, fmt), weights, fmt, dtype, global_scale) for rows in w.split(step)]
    zero = torch.cat([p.zero for p in params if p.zero is not None]) if params[0].zero is not None else None
    return Params(torch.cat([p.scale for p in params]), zero, global_scale)


def search_factors(fmt: Format) -> tuple[float, ...]:
    """The fractions of the full range that the scale search tries, the full range first."""
    if fmt.scale == "e8m0":
        return (1.0,)  # the next exponents are a factor of two away: measured, they are hardly ever better
    if fmt.kind == "fp8":
        return (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15)
    if fmt.kind == "fp4":
        return (1.0, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.5)
    if fmt.bits <= 3:
        return (1.0, *(f / 100 for f in range(45, 100, 5)), 1.07, 1.15)
    return (1.0, *(f / 100 for f in range(64, 112, 3) if f != 100))


def _search(t: Tensor, weights: Tensor | None, fmt: Format, dtype: torch.dtype, global_scale: Tensor | None) -> Params:
    """The best of ``search_factors`` for each tile of t [R, C, n]; weights: [1, C, n] or None."""
    factors = torch.tensor(search_factors(fmt))[:, None, None]
    low, high = (x * factors for x in _range(t))
    candidates = params_from_range(low, high, fmt, dtype, global_scale)  # [factors, R, C]
    scales = effective_scale(candidates, fmt)[..., None].unbind()
    zeros = None if candidates.zero is None else candidates.zero.to(torch.float32)[..., None].unbind()
    errors = torch.empty(low.shape)
    buffer = torch.empty_like(t)
    for i, scale in enumerate(scales):
        torch.div(t, scale, out=buffer)
        if zeros is None:
            round_to_grid_(buffer, fmt)
        else:
            round_to_grid_(buffer.add_(zeros[i]), fmt).sub_(zeros[i])
        buffer.mul_(scale).sub_(t).square_()
        torch.sum(buffer if weights is None else buffer.mul_(weights), -1, out=errors[i])
    best = errors.nan_to_num_(nan=torch.inf).argmin(0, keepdim=True)  # of equal ones the first
    return Params(
        _take(candidates.scale, best), None if candidates.zero is None else _take(candidates.zero, best), global_scale
    )


def _take(t: Tensor, index: Tensor) -> Tensor:
    """Entries of t at ``index`` along the first axis. Bytes are gathered for float8, since not every build gathers it."""
    if t.dtype == torch.float8_e4m3fn:
        return t.view(torch.uint8).gather(0, index)[0].view(t.dtype)
    return t.gather(0, index)[0]


# ---- codes -----------------------------------------------------------------------------------------------------


def qdq(w: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format) -> Tensor:
    """Quantize and dequantize; scale and zero (float32) broadcast against w. The one function all solvers call."""
    if zero is None:
        return round_to_grid(w / scale, fmt) * scale
    return (round_to_grid(w / scale + zero, fmt) - zero) * scale


def grid_to_codes(values: Tensor, fmt: Format) -> Tensor:
    """Values of the code grid (float) to the codes that are stored."""
    if fmt.kind == "int":
        return values.to(torch.int8)
    if fmt.kind == "fp8":
        return values.to(torch.float8_e4m3fn)
    index = torch.bucketize(values.abs(), torch.tensor(E2M1, dtype=values.dtype, device=values.device))
    return (index.to(torch.uint8)) | (torch.signbit(values).to(torch.uint8) << 3)


def codes_to_grid(codes: Tensor, fmt: Format) -> Tensor:
    """float32 values of the code grid; the inverse of ``grid_to_codes``."""
    if fmt.kind != "fp4":
        return codes.to(torch.float32)
    lut = torch.tensor((*E2M1, *(-v for v in E2M1)), dtype=torch.float32, device=codes.device)
    return lut[codes.to(torch.int32)]


def quantize(w: Tensor, p: Params, fmt: Format) -> QTensor:
    """Round w (float32 [out, in]) to codes under the given params."""
    values = tiles(w, fmt) / effective_scale(p, fmt)[..., None]
    if p.zero is not None:
        values += p.zero.to(torch.float32)[..., None]
    codes = grid_to_codes(round_to_grid(values, fmt), fmt)
    return QTensor(untile(codes, fmt, (w.shape[0], w.shape[1])).contiguous(), p, fmt)


def dequantize(q: QTensor) -> Tensor:
    """float32 [out, in]: exactly what the packed checkpoint stands for."""
    values = tiles(codes_to_grid(q.codes, q.format), q.format)
    if q.params.zero is not None:
        values = values - q.params.zero.to(torch.float32)[..., None]
    dense = untile(values * effective_scale(q.params, q.format)[..., None], q.format, q.shape)
    dense = dense if q.sparse is None else sparse.add_(dense, q.sparse)
    return dense if q.low_rank is None else lowrank.add_(dense, q.low_rank)


def weight_sha256(row_slices: Iterable[QTensor]) -> str:
    """sha256 of the dequantized weight in float32, little-endian, row by row.

    parts: its rows in slices; the full weight would be the largest tensor of a run. The low-rank part is left out: programs
    may round its sums differently.
    """
    digest = hashlib.sha256()
    for row_slice in row_slices:
        digest.update(dequantize(replace(row_slice, low_rank=None)).contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
