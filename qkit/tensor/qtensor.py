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

from qkit.tensor import block_params, lowrank, sparse
from qkit.tensor.formats import FP8_MAX, NVFP4_RANGE, Format
from qkit.tensor.grid import E2M1 as E2M1
from qkit.tensor.grid import code_range as code_range
from qkit.tensor.grid import codes_to_grid as codes_to_grid
from qkit.tensor.grid import grid_spacing as grid_spacing
from qkit.tensor.grid import grid_to_codes as grid_to_codes
from qkit.tensor.grid import half_range as half_range
from qkit.tensor.grid import round_to_grid as round_to_grid
from qkit.tensor.grid import round_to_grid_ as round_to_grid_
from qkit.tensor.lowrank import LowRank
from qkit.tensor.params import Params as Params
from qkit.tensor.params import effective_minimum as effective_minimum
from qkit.tensor.params import effective_scale as effective_scale
from qkit.tensor.params import expand as expand
from qkit.tensor.params import param_shape as param_shape
from qkit.tensor.params import tiles as tiles
from qkit.tensor.params import untile as untile
from qkit.tensor.sparse import Sparse

_SEARCH_ELEMENTS = 1 << 16  # of a weight, held by one step of the scale search: its buffers stay in the L2 cache


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

    def to(self, device: torch.device) -> QTensor:
        """The weight on another device."""
        sparse, low_rank = (None if x is None else x.to(device) for x in (self.sparse, self.low_rank))
        return QTensor(self.codes.to(device), self.params.to(device), self.format, sparse, low_rank)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]


# ---- scales ----------------------------------------------------------------------------------------------------


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
    if fmt.gguf and fmt.kind != "fp4":
        return block_params.find(w, fmt, importance, search)
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
    if global_scale is not None and fmt.gguf:  # llama.cpp applies it after the sum: a power of two changes no rounding
        global_scale = torch.exp2(global_scale.log2().floor())
    if not search or fmt.strategy == "block":
        return params_from_range(*_range(tiles(w, fmt)), fmt, dtype, global_scale)
    if fmt.strategy == "tensor":
        return _search(tiles(w, fmt), None, fmt, dtype, global_scale)
    step = max(1, _SEARCH_ELEMENTS // w.shape[1])
    weights = None if importance is None else tiles(importance[None].to(torch.float32), fmt)
    params = [_search(tiles(rows, fmt), weights, fmt, dtype, global_scale) for rows in w.split(step)]
    return Params.cat(params, dim=0)


def search_factors(fmt: Format) -> tuple[float, ...]:
    """The fractions of the full range that the scale search tries, the full range first."""
    if (
        fmt.scale == "e8m0"
    ):  # the next exponents are a factor of two away: measured, they take 1 to 2 % off the squared error
        return (1.0, 0.5, 2.0) if fmt.gguf else (1.0,)
    if fmt.kind == "fp8":
        return (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15)
    if fmt.kind == "fp4":
        return (1.0, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.5)
    if fmt.bits <= 3:
        return (1.0, *(f / 100 for f in range(45, 100, 5)), 1.07, 1.15)
    return (1.0, *(f / 100 for f in range(64, 112, 3) if f != 100))


def _search(t: Tensor, weights: Tensor | None, fmt: Format, dtype: torch.dtype, global_scale: Tensor | None) -> Params:
    """The best of ``search_factors`` for each tile of t [R, C, n]; weights: [1, C, n] or None."""
    factors = torch.tensor(search_factors(fmt), device=t.device)[:, None, None]
    low, high = (x * factors for x in _range(t))
    candidates = params_from_range(low, high, fmt, dtype, global_scale)  # [factors, R, C]
    scales = effective_scale(candidates, fmt)[..., None].unbind()
    zeros = None if candidates.zero is None else candidates.zero.to(torch.float32)[..., None].unbind()
    errors = torch.empty(low.shape, device=t.device)
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


def quantize(w: Tensor, p: Params, fmt: Format) -> QTensor:
    """Round w (float32 [out, in]) to codes under the given params."""
    minimum = effective_minimum(p)
    values = tiles(w, fmt) if minimum is None else tiles(w, fmt) - minimum[..., None]
    values = values / effective_scale(p, fmt)[..., None]
    if p.zero is not None:
        values += p.zero.to(torch.float32)[..., None]
    codes = grid_to_codes(round_to_grid(values, fmt), fmt)
    return QTensor(untile(codes, fmt, (w.shape[0], w.shape[1])).contiguous(), p, fmt)


def dequantize(q: QTensor) -> Tensor:
    """float32 [out, in]: exactly what the packed checkpoint stands for."""
    values = tiles(codes_to_grid(q.codes, q.format), q.format)
    if q.params.zero is not None:
        values = values - q.params.zero.to(torch.float32)[..., None]
    values = values * effective_scale(q.params, q.format)[..., None]
    minimum = effective_minimum(q.params)
    dense = untile(values if minimum is None else values + minimum[..., None], q.format, q.shape)
    dense = dense if q.sparse is None else sparse.add_(dense, q.sparse)
    return dense if q.low_rank is None else lowrank.add_(dense, q.low_rank)


def weight_sha256(row_slices: Iterable[QTensor]) -> str:
    """sha256 of the dequantized weight in float32, little-endian, row by row.

    parts: its rows in slices; the full weight would be the largest tensor of a run. The low-rank part is left out: programs
    may round its sums differently.
    """
    digest = hashlib.sha256()
    for row_slice in row_slices:
        dense = dequantize(replace(row_slice, low_rank=None)).contiguous().cpu()
        digest.update(dense.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
