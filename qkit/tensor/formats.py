"""Number formats and schemes, as data.

A ``Format`` says how a tensor of numbers becomes codes and scales: the grid of the codes, which
elements share a scale, and the type of that scale. A ``Scheme`` pairs a weight format with an
activation format (or none). Everything else in qkit (quantizers, packers, exporters, the verifier's
expectations, the tables in the README) reads these two tables; adding a format adds one line here.

Conventions, the same for every format (compressed-tensors 0.20 computes the same way):
  dequantized = (code - zero) * scale                 for integers, codes in [-2^(b-1), 2^(b-1)-1]
  dequantized = code * scale                          for FP8 and MX formats
  dequantized = code * (scale / global_scale)         for NVFP4
  dequantized = code * scale + minimum                for the types of GGUF, as llama.cpp computes them
Symmetric integer scale = amax / ((2^b - 1) / 2); FP8 scale = amax / 448; E2M1 scale = amax / 6.
Rounding is to nearest, ties to even.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from qkit.errors import Unsupported, UsageError

FP4_MAX = 6.0  # largest E2M1 magnitude
FP8_MAX = 448.0  # largest E4M3 (fn) magnitude
SUPER_BLOCK = 256  # columns of a super-block of GGUF's K types
NVFP4_COLUMNS = 64  # of a block of NVFP4 in GGUF
GGUF_PREFIX = "GGUF_"  # of schemes whose names in GGUF are those of other schemes, too
COMMON_COLUMNS = 32  # what every type of GGUF needs to divide a width
COMMON_GROUPS = (64, 32)  # tried in this order where a group does not divide a width
NVFP4_RANGE = FP4_MAX * FP8_MAX  # 2688: global_scale = 2688 / amax


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format: the grid of codes, and how scales are stored.

    name:       canonical name, as it appears in recipes and reports
    kind:       'int', 'fp4' (E2M1) or 'fp8' (E4M3, finite); of GGUF also 'uint' (codes from 0 on, with a minimum) and 'nl4'
                (the 16 values of IQ4_NL)
    bits:       bits per code
    strategy:   which elements share a scale: 'group' (``group`` consecutive elements of a row),
                'channel' (a row of a weight), 'token' (a row of an activation), 'tensor', 'block'
                (``block`` = rows x columns), 'tensor_group' (NVFP4: groups under one tensor scale)
    group:      group length along the input dimension, where the strategy has one
    block:      (rows, columns) of a block, for 'block'
    symmetric:  True: no zero point
    scale:      type of the stored scale: 'model' (the dtype of the model), 'e4m3' or 'e8m0'; of GGUF 'f16', or 'super' for
                small integers under float16 scales of 256 columns (``SUPER_BLOCK``)
    dynamic:    activations only: scales are computed from the live values
    """

    name: str
    kind: str
    bits: int
    strategy: str
    group: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    scale: str = "model"
    dynamic: bool = False

    def __str__(self) -> str:
        return f"{self.name}, group {self.group}" if self.group and self.scale == "model" else self.name

    @property
    def gguf(self) -> bool:
        """Whether this is a type of GGUF."""
        return self.name in GGUF_FORMATS

    @property
    def span(self) -> int | None:
        """How many columns have their scales chosen together: a super-block, or a group; None without groups."""
        return SUPER_BLOCK if self.scale == "super" else self.group

    @property
    def columns(self) -> int:
        """How many columns a block of a type of GGUF has."""
        return NVFP4_COLUMNS if self.strategy == "tensor_group" else self.span or COMMON_COLUMNS

    @property
    def ggml(self) -> str:
        """What a GGUF file calls the type."""
        return self.name.upper().removeprefix(GGUF_PREFIX)

    @property
    def for_lookups(self) -> bool:
        """Whether llama.cpp looks up rows of embeddings in this type of GGUF: it leaves out the scale of a tensor there."""
        return self.strategy != "tensor_group"

    @property
    def regroups(self) -> bool:
        """Whether the format has groups of weights whose size can be chosen."""
        return self.strategy == "group" and self.scale == "model"

    def with_group(self, group: int) -> Format:
        """The same format with another group length; -1 means one scale per output channel."""
        if self.kind != "int" or self.gguf:
            raise UsageError(
                f"format {self.name} has a fixed scale layout; --group-size cannot change it: leave the option out"
            )
        if group == -1:
            return dataclasses.replace(self, strategy="channel", group=None)
        if group < 1:
            raise UsageError(f"group size {group}: expected a positive number, or -1 for one scale per channel")
        return dataclasses.replace(self, strategy="group", group=group)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``Format.from_json`` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Format:
        """The format of a dictionary made by ``to_json``."""
        block = data.get("block")
        return Format(**{**data, "block": tuple(block) if block else None})


@dataclass(frozen=True)
class Scheme:
    """A weight format with an activation format (None: activations are not quantized)."""

    name: str
    weights: Format
    activations: Format | None = None


def _int(bits: int, symmetric: bool = True, strategy: str = "group") -> Format:
    name = f"int{bits}" + ("" if symmetric else "_asym")
    if strategy != "group":
        name += f"_{strategy}"
    return Format(
        name=name,
        kind="int",
        bits=bits,
        strategy=strategy,
        group=128 if strategy == "group" else None,
        symmetric=symmetric,
    )


_WEIGHTS = [
    *(_int(b, s, k) for b in range(2, 9) for s in (True, False) for k in ("group", "channel", "tensor")),
    Format(name="nvfp4", kind="fp4", bits=4, strategy="tensor_group", group=16, scale="e4m3"),
    Format(name="mxfp4", kind="fp4", bits=4, strategy="group", group=32, scale="e8m0"),
    Format(name="mxfp8", kind="fp8", bits=8, strategy="group", group=32, scale="e8m0"),
    Format(name="fp8", kind="fp8", bits=8, strategy="tensor"),
    Format(name="fp8_channel", kind="fp8", bits=8, strategy="channel"),
    Format(name="fp8_block", kind="fp8", bits=8, strategy="block", block=(128, 128)),
]
_ACTIVATIONS = [
    Format(name="int8_token", kind="int", bits=8, strategy="token", dynamic=True),
    Format(name="fp8_token", kind="fp8", bits=8, strategy="token", dynamic=True),
    Format(name="fp8_static", kind="fp8", bits=8, strategy="tensor"),
    Format(name="fp8_group", kind="fp8", bits=8, strategy="group", group=128, dynamic=True),
    Format(name="nvfp4_dynamic", kind="fp4", bits=4, strategy="tensor_group", group=16, scale="e4m3", dynamic=True),
    Format(name="mxfp4_dynamic", kind="fp4", bits=4, strategy="group", group=32, scale="e8m0", dynamic=True),
    Format(name="mxfp8_dynamic", kind="fp8", bits=8, strategy="group", group=32, scale="e8m0", dynamic=True),
]
FORMATS: dict[str, Format] = {f.name: f for f in _WEIGHTS}
ACTIVATION_FORMATS: dict[str, Format] = {f.name: f for f in _ACTIVATIONS}


def _gguf(name: str, kind: str, bits: int, group: int, scale: str) -> Format:
    """A type of GGUF; those with a minimum are the asymmetric ones."""
    strategy = "tensor_group" if scale == "e4m3" else "group"
    return Format(
        name=name, kind=kind, bits=bits, strategy=strategy, group=group, symmetric=kind != "uint", scale=scale
    )


GGUF_FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _gguf("q8_0", "int", 8, 32, "f16"),
        _gguf("q5_0", "int", 5, 32, "f16"),
        _gguf("q4_0", "int", 4, 32, "f16"),
        _gguf("q5_1", "uint", 5, 32, "f16"),
        _gguf("q4_1", "uint", 4, 32, "f16"),
        _gguf("iq4_nl", "nl4", 4, 32, "f16"),
        _gguf("q6_k", "int", 6, 16, "super"),
        _gguf("q5_k", "uint", 5, 32, "super"),
        _gguf("q4_k", "uint", 4, 32, "super"),
        _gguf("q3_k", "int", 3, 16, "super"),
        _gguf("q2_k", "uint", 2, 16, "super"),
        _gguf("iq4_xs", "nl4", 4, 32, "super"),
        _gguf("gguf_mxfp4", "fp4", 4, 32, "e8m0"),
        _gguf("gguf_nvfp4", "fp4", 4, 16, "e4m3"),
    )
}
# For a width that 256 does not divide: types of the same bytes as llama.cpp's quantizer takes. For Q2_K and Q3_K newer versions
# of it take Q4_0, which has the bytes of IQ4_NL and an even grid. That of NVFP4 is our choice.
_NARROW = {
    "q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "iq4_nl", "q2_k": "iq4_nl", "iq4_xs": "iq4_nl",
    "gguf_nvfp4": "gguf_mxfp4",
}  # fmt: skip


def fit_gguf(fmt: Format, width: int) -> Format | None:
    """The type of GGUF for a weight of that many columns: the one given, or one with blocks of 32 and the bytes of what
    llama.cpp takes in its place; None where 32 does not divide the width either."""
    if not width % fmt.columns:
        return fmt
    return None if width % COMMON_COLUMNS else GGUF_FORMATS[_NARROW[fmt.name]]


def _scheme(name: str, weights: str, activations: str | None = None) -> Scheme:
    return Scheme(name, FORMATS[weights], ACTIVATION_FORMATS[activations] if activations else None)


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        *(_scheme(f"W{b}A16", f"int{b}") for b in range(2, 9)),
        *(_scheme(f"W{b}A16_ASYM", f"int{b}_asym") for b in range(2, 9)),
        _scheme("W8A8", "int8_channel", "int8_token"),
        _scheme("W4A8", "int4", "int8_token"),
        _scheme("W4A8-FP8", "int4", "fp8_token"),
        _scheme("NVFP4", "nvfp4", "nvfp4_dynamic"),
        _scheme("NVFP4A8", "nvfp4", "int8_token"),
        _scheme("NVFP4A16", "nvfp4"),
        _scheme("6BIT", "nvfp4", "nvfp4_dynamic"),  # of diffusion transformers: NVFP4 or INT8 activations, step by step
        _scheme("MXFP4", "mxfp4", "mxfp4_dynamic"),
        _scheme("MXFP4A16", "mxfp4"),
        _scheme("MXFP8", "mxfp8", "mxfp8_dynamic"),
        _scheme("MXFP8A16", "mxfp8"),
        _scheme("FP8", "fp8", "fp8_static"),
        _scheme("FP8_DYNAMIC", "fp8_channel", "fp8_token"),
        _scheme("FP8_BLOCK", "fp8_block", "fp8_group"),
    )
}
GGUF_SCHEMES: dict[str, Scheme] = {name.upper(): Scheme(name.upper(), fmt) for name, fmt in GGUF_FORMATS.items()}
# Names other tools use for the same thing.
ALIASES = {"INT8": "W8A8", "W4AFP8": "W4A8-FP8", "W4A8_FP8": "W4A8-FP8", "FP8_STATIC": "FP8"}


def did_you_mean(name: str, known: list[str], most: int = 1) -> str:
    """'; did you mean X?' for the nearest known names, ``most`` of them at most, or the empty string."""
    matches = get_close_matches(name, known, n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(', '.join(matches).rsplit(', ', 1))}?" if matches else ""


def scheme(name: str) -> Scheme:
    """The scheme with a name or an alias, in any case.

    Raises UsageError, which names the nearest known scheme.
    """
    key = ALIASES.get(name.upper(), name.upper())
    known = SCHEMES | GGUF_SCHEMES
    mix = re.fullmatch(r"(Q[2-6]_K)_X?[SML]", key)
    if mix:
        raise UsageError(
            f"unknown scheme '{name}': it is llama.cpp's name for a mix of types: use {mix[1].lower()} for one type, or "
            "--size with --candidates gguf for a type for every tensor, chosen by what it costs"
        )
    if key not in known:
        raise UsageError(
            f"unknown scheme '{name}'{did_you_mean(key, [*known, *ALIASES])} ('qkit list schemes' shows all)"
        )
    return known[key]


def layout(weights: Format, activations: Format | None) -> str:
    """The compressed-tensors format name of a weight and activation pair."""
    if weights.kind == "int":
        plain = weights.bits == 8 and activations is not None and weights.strategy in ("channel", "tensor")
        return "int-quantized" if plain else "pack-quantized"
    if weights.scale == "e4m3":
        return "nvfp4-pack-quantized"
    if weights.scale == "e8m0":
        return "mxfp4-pack-quantized" if weights.kind == "fp4" else "mxfp8-quantized"
    return "naive-quantized" if activations is None else "float-quantized"


def fit_group(fmt: Format, *widths: int, strict: bool = False) -> Format:
    """The format, with a group that divides the given input widths (several widths: linears that share a group length).

    A group that does not divide all of them is replaced by 64, else by 32, else by one scale per channel: engines have
    kernels for these and not for other numbers. Formats whose group is fixed by definition (NVFP4, MX) cannot be adapted.
    Raises Unsupported under ``strict`` and for the fixed formats.
    """
    if fmt.gguf:
        fitted = fit_gguf(fmt, math.gcd(*widths))
        if fitted is None or (strict and fitted != fmt):
            raise Unsupported(
                f"{min(widths)} input columns are not whole blocks of {fmt.name}: choose another type, or skip it"
            )
        return fitted
    if fmt.strategy not in ("group", "tensor_group") or fmt.group is None:
        return fmt
    misfit = next((w for w in widths if w % fmt.group), None)
    if misfit is None:
        return fmt
    reason = f"{misfit} input columns are not a multiple of the group size {fmt.group} of {fmt.name}"
    if fmt.scale != "model":
        raise Unsupported(f"{reason}, which the format fixes: choose another format for this layer or skip it")
    if strict:
        raise Unsupported(f"{reason}, and --strict forbids another group: choose a group size that divides it")
    return fmt.with_group(next((g for g in COMMON_GROUPS if not math.gcd(*widths) % g), -1))
