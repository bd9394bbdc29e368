"""GPTQ as AutoGPTQ and GPTQModel store it.

Of a linear [out, in]: ``qweight`` int32 [in * bits / 32, out], codes along the inputs, the first in the lowest bits (3-bit
codes as one stream of 32 in three words); ``qzeros`` int32 [groups, out * bits / 32] likewise along the outputs; ``scales``
[groups, out]; ``g_idx`` int32 [in], the group of every input, where columns were taken in order of activations. The plain
weight is (code - zero) * scale in the dtype of the scales, then rounded to that of the model. In the first version of the
format (``checkpoint_format: gptq``, or none) a zero point is stored less one, in ``gptq_v2`` as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qkit.errors import Unsupported
from qkit.files.safefile import TensorInfo, shown
from qkit.files.sources.decoded import DecodedInfo, Found, Parts, Stored, number
from qkit.files.sources.groups import Groups, decode_groups, in_order, kept_groups
from qkit.system.patterns import PREFIX, is_pattern, matched

if TYPE_CHECKING:
    from torch import Tensor

_BITS = (2, 3, 4, 8)
_VERSIONS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class _Setting:
    """What the config says of one linear."""

    bits: int
    symmetric: bool


def find(stored: Stored) -> Found:
    """The GPTQ linears of a folder. Raises Unsupported for other layouts, BadCheckpoint for shapes that do not fit."""
    config = stored.quantization
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in _VERSIONS:
        raise Unsupported(
            f"{stored.where}: config.json: checkpoint_format is {shown(version)}, and of GPTQ qkit decodes "
            f"{' and '.join(_VERSIONS)}: dequantize the model first, or use the original"
        )
    names = [name.removesuffix(".qweight") for name in stored.tensors if name.endswith(".qweight")]
    settings = _settings(stored, names)
    return Found({f"{n}.weight": _linear(stored, n, settings[n], version == "gptq") for n in names}, ())


def _linear(stored: Stored, name: str, setting: _Setting, less_one: bool) -> DecodedInfo:
    bits, symmetric = setting.bits, setting.symmetric
    parts = {"codes": stored.tensors[f"{name}.qweight"]}
    for leaf, role in (("scales", "scale"), ("qzeros", "zero")):
        parts[role] = stored.part(f"{name}.{leaf}", "tensor", f"{name}.qweight")
    if f"{name}.g_idx" in stored.tensors:
        parts["group_of"] = stored.tensors[f"{name}.g_idx"]
    shape = _shape(stored, parts, bits)
    unpack = partial(_unpack, bits=bits, columns=shape[1], less_one=less_one)
    decode = partial(decode_groups, shape=shape, cut=partial(_cut, bits=bits), unpack=unpack, dtype=stored.torch_dtype)
    encoding = f"GPTQ with {bits} bits"
    zeros = partial(_zeros, bits=bits, rows=shape[0], less_one=less_one)
    doubt = partial(
        _doubt, ordered="group_of" in parts, shape=shape, zeros=zeros, half=1 << (bits - 1) if symmetric else None
    )
    kept = kept_groups(bits, shape, parts["scale"], unpack, doubt, symmetric)
    return stored.decoded(f"{name}.weight", shape, parts, decode, encoding, kept)


def _settings(stored: Stored, names: list[str]) -> dict[str, _Setting]:
    """Bits and symmetry of each linear: those of the whole file, or of the first rule (``dynamic`` of GPTQModel,
    ``extra_config`` of AutoRound) that is about it."""
    config = stored.quantization
    rules = config.get("dynamic") or config.get("extra_config") or {}
    if not isinstance(rules, dict) or not all(isinstance(rule, dict) for rule in rules.values()):
        raise Unsupported(
            f"{stored.where}: config.json: quantization_config: the rules for single layers are no object of objects: get the "
            "config of this model"
        )
    hits = _hits(stored, rules, names, plain="dynamic" not in config)
    bits, symmetric = _bits(stored, "all layers", number(stored, "bits")), config.get("sym") is True
    settings: dict[str, _Setting] = {}
    for name in names:
        rule: dict[str, Any] = next((rules[key] for key in rules if name in hits[key]), {})
        settings[name] = _Setting(_bits(stored, name, rule.get("bits", bits)), rule.get("sym", symmetric) is True)
    return settings


def _hits(stored: Stored, rules: dict[str, Any], names: list[str], plain: bool) -> dict[str, frozenset[str]]:
    """{rule: linears that it is about}. plain: a key may be the name of a layer"""
    patterns = {key: PREFIX + key.removeprefix("+:").removeprefix("-:") for key in rules}
    wrong = next((key for key, pattern in patterns.items() if not is_pattern(pattern)), None)
    if wrong is not None:
        raise Unsupported(
            f"{stored.where}: config.json: {shown(wrong)} is no pattern of layers: list the layers by name"
        )
    try:
        found = matched(patterns.values(), names)
    except ValueError as e:
        raise Unsupported(f"{stored.where}: config.json: quantization_config: {e}: list the layers by name") from e
    known = set(names)
    exact = {key: frozenset({key}) for key in rules if plain and key in known}
    return {key: exact.get(key, found.get(pattern, frozenset())) for key, pattern in patterns.items()}


def _bits(stored: Stored, name: str, bits: Any) -> int:
    if type(bits) is not int or bits not in _BITS:
        raise Unsupported(
            f"{stored.where}: config.json: quantization_config.bits is {shown(bits)}, expected one of "
            f"{', '.join(map(str, _BITS))} for GPTQ ({shown(name)}): get the config of this model"
        )
    return bits


def _shape(stored: Stored, parts: dict[str, TensorInfo], bits: int) -> tuple[int, int]:
    """(out, in), after a check of all shapes and dtypes."""
    codes, scale, zero = parts["codes"], parts["scale"], parts["zero"]
    if codes.dtype != "I32" or len(codes.shape) != 2 or codes.shape[0] * 32 % bits:
        stored.refuse(codes.name, f"is {codes.dtype} {list(codes.shape)}, expected I32 [in * {bits} / 32, out]")
    columns, rows = codes.shape[0] * 32 // bits, codes.shape[1]
    if (
        len(scale.shape) != 2
        or scale.shape[1] != rows
        or not scale.shape[0]
        or scale.dtype not in ("F16", "BF16", "F32")
    ):
        stored.refuse(scale.name, f"is {scale.dtype} {list(scale.shape)}, expected floats [groups, {rows}]")
    expected = (scale.shape[0], math.ceil(rows * bits / 32))
    if zero.dtype != "I32" or zero.shape != expected:
        stored.refuse(zero.name, f"is {zero.dtype} {list(zero.shape)}, expected I32 {list(expected)}")
    order = parts.get("group_of")
    if order is not None and (order.dtype not in ("I32", "I64") or order.shape != (columns,)):
        stored.refuse(order.name, f"is {order.dtype} {list(order.shape)}, expected I32 [{columns}]")
    if order is None and columns % scale.shape[0]:
        stored.refuse(scale.name, f"has {scale.shape[0]} groups, which do not divide {columns} inputs")
    return rows, columns


def _cut(parts: Parts, some: slice, bits: int) -> Parts:
    """The stored tensors of some outputs, whose number divides by 32 but for the last."""
    words = slice(some.start * bits // 32, -(-some.stop * bits // 32))
    return {
        **parts, "codes": parts["codes"][:, some], "scale": parts["scale"][:, some], "zero": parts["zero"][:, words]
    }  # fmt: skip


def _unpack(parts: Parts, bits: int, columns: int, less_one: bool) -> Groups:
    import torch

    from qkit.tensor.packing import unpack_bits

    scale, group_of = parts["scale"].T, parts.get("group_of")
    codes = unpack_bits(parts["codes"].T.contiguous(), bits, columns).to(torch.int16) + (1 << (bits - 1))
    zero = _zeros(parts["zero"], bits, scale.shape[0], less_one)
    return Groups(codes, zero, scale, None if group_of is None else group_of.long())


def _zeros(words: Tensor, bits: int, rows: int, less_one: bool) -> Tensor:
    """int16 [out, groups]: zero points, from 0 on."""
    import torch

    from qkit.tensor.packing import unpack_bits

    if less_one and bits != 3:
        # Whole words, as GPTQModel adds: what a writer borrowed from a neighbour goes back to it.
        ones = sum(1 << at for at in range(0, 32, bits))
        words = ((words.to(torch.int64) + ones + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)
    zero = unpack_bits(words.contiguous(), bits, rows).to(torch.int16).T + (1 << (bits - 1))
    return (zero + 1) & 7 if less_one and bits == 3 else zero


def _doubt(
    read: Callable[[str], Tensor],
    ordered: bool,
    shape: tuple[int, int],
    zeros: Callable[[Tensor], Tensor],
    half: int | None,
) -> str | None:
    """Why a linear cannot be kept. ordered: its columns name their groups; half: what every zero point has to be, if any"""
    import torch

    zero = zeros(read("zero"))
    if half is not None and bool((zero != half).any()):
        return f"config.json says sym, and a zero point is {int(zero[zero != half][0])} where {half} is meant"
    if ordered and not torch.equal(read("group_of").long(), in_order(shape[1], zero.shape[1])):
        return "a result has no place for groups of columns in the order of activations (g_idx)"
    return None
