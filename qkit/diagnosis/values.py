"""The numbers of a file: scales, zero points, codes and the weights that they stand for, one layer at a time."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from qkit.diagnosis.findings import Findings
from qkit.diagnosis.layers import INPUTS, Layer, count
from qkit.errors import QkitError
from qkit.files.safefile import TensorInfo, read_tensor
from qkit.tensor.packing import unpack_bits

_AGAIN = "quantize the layer again"
_FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
_LOW, _HIGH = 1e-4, 1e3  # rms of a weight times the root of its columns: trained and random ones have about 1
_SPREAD = 1e3  # the largest scale of a layer over its median
_OTHERS = 30.0  # rms of a layer over that of others with its name
_ENOUGH = 64  # weights for each code before a missing one means something
_FEW = 0.02  # a share of negative scales that no rule of rounding makes


@dataclass
class Measured:
    """What one layer showed: rms of its decoded weight, columns, and whether it is all zero."""

    name: str
    rms: float
    columns: int

    @property
    def size(self) -> float:
        """The rms as it would be for a weight of one column."""
        return self.rms * math.sqrt(self.columns)


def scale_values(info: TensorInfo, e4m3: bool = False) -> Tensor:
    """float32 scales; bytes are exponents of two, or E4M3."""
    values = read_tensor(info)
    if e4m3 and info.dtype == "U8":
        return values.view(torch.float8_e4m3fn).to(torch.float32)
    if info.dtype in ("U8", "F8_E8M0"):
        exponents = values.view(torch.uint8) if info.dtype != "U8" else values
        powers = (exponents.to(torch.float32) - 127.0).exp2()
        return torch.where(exponents == 255, torch.full_like(powers, float("nan")), powers)
    return values.to(torch.float32)


def _as_e4m3(layer: Layer) -> bool:
    """Whether scales in bytes are E4M3 numbers, as MLX stores those of NVFP4."""
    return layer.weights is not None and layer.weights.scale == "e4m3"


def check_scales(layer: Layer, findings: Findings) -> bool:
    """Whether all scales of a layer are finite, after a look at each."""
    sound = True
    for leaf, info in layer.leaves.items():
        if "scale" not in leaf or 0 in info.shape or (leaf == "pre_quant_scale" and info.dtype not in _FLOATS):
            continue
        try:
            values = scale_values(info, _as_e4m3(layer))
        except QkitError as error:
            findings.fault("scales", layer.name, f"{leaf} cannot be read: {error}", "numbers", _AGAIN, 8)
            sound = False
            continue
        sound &= _check_values(layer, leaf, values, findings)
    return sound


def _check_values(layer: Layer, leaf: str, values: Tensor, findings: Findings) -> bool:
    where, total = layer.name, values.numel()
    bad = int((~values.isfinite()).sum())
    if bad:
        findings.fault(
            "scales", where, f"{bad} of {total} values of {leaf} are NaN or infinite", "finite numbers", _AGAIN, 9
        )
        return False
    zero, negative = int((values == 0).sum()), int((values < 0).sum())
    if zero and layer.leaves[leaf] is not layer.scale:
        report_zeros(layer.name, leaf, zero, total, findings)
    signed = layer.weights is not None and layer.weights.kind == "int" and leaf not in INPUTS and total > 1
    if negative and not (signed and negative > _FEW * total):
        findings.fault(
            "scales", where, f"{negative} of {total} values of {leaf} are negative", "numbers above zero", _AGAIN, 8
        )
    elif negative:
        findings.note("scales", where, f"a part of {leaf} is negative, as some writers use it for symmetric integers")
    size = values.abs()
    middle = float(size.median())
    if total > 8 and middle > 0 and float(size.max()) > _SPREAD * middle and leaf != "pre_quant_scale":
        largest, factor = float(size.max()), float(size.max()) / middle
        findings.fault(
            "scales", where, f"the largest value of {leaf} is {largest:.3g}, {factor:.0f} times the median",
            "scales of one size", _AGAIN, 7,
        )  # fmt: skip
    return True


def report_zeros(where: str, leaf: str, zero: int, total: int, findings: Findings) -> None:
    """Scales of zero, which make weights zero that are not."""
    findings.fault("scales", where, f"{zero} of {total} values of {leaf} are zero", "numbers above zero", _AGAIN, 8)


def count_zeros(layer: Layer) -> int:
    """Scales of a layer that are zero. Those in bytes never are."""
    info = layer.scale
    if info is None or info.dtype not in _FLOATS:
        return 0
    return int((scale_values(info) == 0).sum())


# ---- codes -------------------------------------------------------------------------------------------------------


def check_codes(layer: Layer, findings: Findings) -> None:
    """Codes that use half the grid or less: they were made for fewer bits, or from weights that were quantized before."""
    codes, fmt = layer.codes, layer.weights
    if codes is None or fmt is None or fmt.kind not in ("int", "fp4", "fp8"):
        return
    used = _histogram(codes, fmt.bits, layer)
    if used is None:
        return
    grid, total = len(used), int(used.sum())
    kinds = int((used > 0).sum())
    if kinds == 1 or total < _ENOUGH * grid:  # one code: a layer of zeros, which is named as such
        return
    if kinds <= grid // 2:
        at = used.nonzero().flatten()
        findings.warn(
            "codes", layer.name, f"its codes have {kinds} of {grid} values, {int(at[0])} to {int(at[-1])}",
            f"nearly all {grid} values of {fmt.name}",
            "look how it was made: with fewer bits than it says, or from a model that was quantized already", 5,
        )  # fmt: skip


def _histogram(codes: TensorInfo, bits: int, layer: Layer) -> Tensor | None:
    """How often each code is used, in the order of stored codes; padding in the last words of a row counts too."""
    values = read_tensor(codes)
    if values.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return torch.bincount(values.view(torch.uint8).flatten().to(torch.int64), minlength=256)
    if values.dtype == torch.int8 and bits == 8:
        return torch.bincount(values.flatten().to(torch.int64) + 128, minlength=256)
    if values.dtype == torch.int8:
        return torch.bincount(
            (values.flatten().to(torch.int64) + (1 << (bits - 1))).clamp(0, (1 << bits) - 1), minlength=1 << bits
        )
    raw = values.contiguous().view(torch.uint8).flatten()
    if bits in (2, 4, 8):
        lanes = [(raw >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return sum(
            (torch.bincount(x.to(torch.int64), minlength=1 << bits) for x in lanes),
            torch.zeros(1 << bits, dtype=torch.int64),
        )
    if layer.shape is None or len(layer.shape) != 2 or codes.dtype not in ("I32", "U32"):
        return None
    values = values.view(torch.int32)
    words = values if "qweight" not in layer.leaves else values.T.contiguous()
    unpacked = unpack_bits(words, bits, layer.shape[1]).to(torch.int64) + (1 << (bits - 1))
    return torch.bincount(unpacked.flatten(), minlength=1 << bits)


def check_zeros(layer: Layer, findings: Findings) -> None:
    """Zero points that lie unpacked and outside the codes."""
    info, fmt = layer.leaves.get("weight_zero_point"), layer.weights
    if info is None or fmt is None or fmt.kind != "int" or info.dtype not in ("I8", "I32", "I16", "I64"):
        return
    scale = layer.scale
    if scale is None or count(info) != count(scale):
        return
    values, half = read_tensor(info).to(torch.int64), 1 << (fmt.bits - 1)
    wrong = (values < -half) | (values >= half)
    if bool(wrong.any()):
        findings.fault(
            "zero points", layer.name, f"{int(wrong.sum())} of {values.numel()} zero points lie outside the codes, first "
            f"{int(values[wrong][0])}", f"{-half} to {half - 1}", _AGAIN, 8,
        )  # fmt: skip


# ---- decoded weights -----------------------------------------------------------------------------------------------


def check_weight(layer: Layer, weight: Tensor, findings: Findings) -> Measured | None:
    """The decoded weight of a layer: finite, not all zero, of a size that weights have."""
    values = weight.to(torch.float32)
    bad = int((~values.isfinite()).sum())
    if bad:
        findings.fault(
            "scales",
            layer.name,
            f"{bad} of {values.numel()} decoded weights are NaN or infinite",
            "finite weights",
            _AGAIN,
            9,
        )
        return None
    rms = float(values.square().mean().sqrt())
    if rms == 0:
        findings.fault("zero layers", layer.name, "all its weights are zero", "weights", _AGAIN, 9)
        return None
    measured = Measured(layer.name, rms, values.shape[-1])
    if not _LOW < measured.size < _HIGH:
        _report_size(layer, measured, findings)
        return None
    return measured


def _report_size(layer: Layer, measured: Measured, findings: Findings) -> None:
    """A weight of an absurd size, and whether the inverse of a scale would give one that weights have."""
    found = f"its decoded weights have the size {measured.rms:.2g} (root of the mean square)"
    for leaf in ("weight_global_scale", "weight_scale_2", "weight_scale_inv", "weight_scale", "scales"):
        info = layer.leaves.get(leaf)
        if info is None or info.dtype not in ("F32", "F16", "BF16"):
            continue
        values = scale_values(info).abs()
        typical = float(values[values > 0].median()) if bool((values > 0).any()) else 0.0
        if not typical:
            continue
        power = 2.0 if leaf == "weight_global_scale" else -2.0
        turned = measured.size * typical**power
        if _LOW * 10 < turned < _HIGH / 10:
            findings.fault(
                "inverted scales", layer.name, f"{found}: {leaf} is about {typical:.3g}, the inverse of what it should be",
                f"about {1 / typical:.3g}", f"store the inverse of {leaf}: conventions of writers differ here", 9,
            )  # fmt: skip
            return
    findings.fault("magnitude", layer.name, found, f"about {1 / math.sqrt(measured.columns):.2g}", _AGAIN, 8)


def compare_sizes(measured: list[Measured], findings: Findings) -> None:
    """Each layer against the others with its name in other blocks."""
    by_leaf: dict[str, list[Measured]] = {}
    for m in measured:
        by_leaf.setdefault(m.name.rpartition(".")[2], []).append(m)
    for leaf, members in by_leaf.items():
        middle = statistics.median(m.rms for m in members)
        for m in members if len(members) > 2 else ():
            factor = m.rms / middle
            if not 1 / _OTHERS < factor < _OTHERS:
                findings.fault(
                    "magnitude", m.name, f"its decoded weights are {factor:.3g} times as large as those of other {leaf}",
                    "weights of about one size", _AGAIN, 7,
                )  # fmt: skip


def check_plain(name: str, info: TensorInfo, findings: Findings) -> None:
    """A plain tensor: finite, and no matrix of zeros."""
    if info.dtype not in _FLOATS or 0 in info.shape:
        return
    values = read_tensor(info).to(torch.float32)
    bad = int((~values.isfinite()).sum())
    if bad and values.dim():
        findings.fault(
            "plain tensors",
            name,
            f"{bad} of {values.numel()} values are NaN or infinite",
            "finite numbers",
            "get the tensor again",
            9,
        )
    elif len(info.shape) >= 2 and "bias" not in name and values.numel() > 1 and not bool(values.any()):
        findings.fault("zero layers", name, "all its values are zero", "weights", "get the tensor again", 8)
