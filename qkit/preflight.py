"""Which engine loads what: a static table, so that the answer costs nothing and needs no engine.

The vLLM rows restate its compressed-tensors dispatcher as read in the 2026 source (formats.md 2.11);
they say what the checkpoint asks for, not that an engine was run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Numbers(Protocol):
    """The fields of a number format that decide which kernel can read it."""

    @property
    def kind(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def strategy(self) -> str: ...
    @property
    def group(self) -> int | None: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def scale(self) -> str: ...
    @property
    def dynamic(self) -> bool: ...


@dataclass(frozen=True)
class EngineFit:
    """How one engine takes a combination. ``loads_as`` None: it does not; ``limits`` says why or what to know."""

    engine: str
    loads_as: str | None
    limits: tuple[str, ...]


Pattern = Mapping[str, tuple[Any, ...]]  # field of Numbers -> the values that match; {} matches every format


@dataclass(frozen=True)
class _Row:
    weights: Pattern
    activations: tuple[Pattern | None, ...]  # alternatives; None: activations are left alone
    packings: tuple[str, ...]
    loads_as: str
    limits: tuple[str, ...] = ()


def _int(bits: tuple[int, ...], *strategies: str, symmetric: tuple[bool, ...] = (True,)) -> Pattern:
    return {"kind": ("int",), "bits": bits, "strategy": strategies, "symmetric": symmetric}


def _dynamic(kind: str, bits: int, *strategies: str) -> Pattern:
    wanted = {"kind": (kind,), "bits": (bits,), "strategy": strategies, "symmetric": (True,), "dynamic": (True,)}
    return {**wanted, "scale": ("model",)}


_2_TO_8 = (2, 3, 4, 5, 6, 7, 8)
_ANY: tuple[Pattern | None, ...] = (None, {})
_FP8: Pattern = {"kind": ("fp8",), "strategy": ("tensor", "channel", "block"), "scale": ("model",)}
_NVFP4: Pattern = {"kind": ("fp4",), "scale": ("e4m3",), "group": (16,)}
_WNA16 = "CompressedTensorsWNA16 (Marlin, Machete, Humming)"
_SPLIT = "the group size has to divide the input columns of every tensor-parallel rank"

VLLM = (
    _Row(_int(_2_TO_8, "group", "channel"), (None,), ("pack-quantized",), _WNA16, (_SPLIT,)),
    _Row(_int((4, 8), "group", "channel", symmetric=(False,)), (None,), ("pack-quantized",), _WNA16, (_SPLIT,)),
    _Row(
        _int(_2_TO_8, "group", "channel"),
        (_dynamic("int", 8, "token", "group"),),
        ("pack-quantized",),
        "CompressedTensorsWNA8Int (Humming)",
        ("sm75 or newer",),
    ),
    _Row(
        _int(_2_TO_8, "group", "channel"),
        (_dynamic("int", 4, "token", "group"),),
        ("pack-quantized",),
        "CompressedTensorsWNA4Int (Humming)",
        ("sm75 or newer",),
    ),
    _Row(
        _int((4,), "group", "channel"),
        (_dynamic("int", 8, "token"),),
        ("int-quantized",),
        "CompressedTensorsW4A8Int",
        ("legacy path that stores one byte per weight: export as pack-quantized",),
    ),
    _Row(
        _int((4,), "group"),
        (_dynamic("fp8", 8, "token"),),
        ("pack-quantized",),
        "CompressedTensorsW4A8Fp8",
        ("sm90 only: no other GPU generation loads it",),
    ),
    _Row(
        _int((8,), "tensor", "channel"),
        (_dynamic("int", 8, "token"), {"kind": ("int",), "bits": (8,), "strategy": ("tensor",), "dynamic": (False,)}),
        ("int-quantized",),
        "CompressedTensorsW8A8Int8",
    ),
    _Row(
        _FP8,
        (
            _dynamic("fp8", 8, "token", "tensor", "group"),
            {"kind": ("fp8",), "strategy": ("tensor",), "dynamic": (False,)},
        ),
        ("float-quantized",),
        "CompressedTensorsW8A8Fp8",
        ("computes in FP8 from sm89 on, weight-only (W8A16Fp8) before",),
    ),
    _Row(_FP8, (None,), ("float-quantized", "naive-quantized"), "CompressedTensorsW8A16Fp8"),
    _Row(
        _NVFP4,
        ({**_NVFP4, "dynamic": (True,)},),
        ("nvfp4-pack-quantized",),
        "CompressedTensorsW4A4Fp4",
        ("computes in FP4 on Blackwell, weight-only elsewhere",),
    ),
    _Row(_NVFP4, (None,), ("nvfp4-pack-quantized",), "CompressedTensorsW4A4Fp4 (use_a16)"),
    _Row({"kind": ("fp4",), "scale": ("e8m0",)}, _ANY, ("mxfp4-pack-quantized",), "CompressedTensorsW4A4Mxfp4"),
    _Row({"kind": ("fp8",), "scale": ("e8m0",)}, _ANY, ("mxfp8-quantized",), "CompressedTensorsW8A8Mxfp8"),
)
_FAST_GROUPS = (32, 64, 128)


def _matches(pattern: Pattern, numbers: Numbers) -> bool:
    return all(getattr(numbers, name) in wanted for name, wanted in pattern.items())


def _takes(alternatives: tuple[Pattern | None, ...], activations: Numbers | None) -> bool:
    if activations is None:
        return None in alternatives
    return any(pattern is not None and _matches(pattern, activations) for pattern in alternatives)


def _vllm(weights: Numbers, activations: Numbers | None, packing: str) -> EngineFit:
    fitting = [row for row in VLLM if _matches(row.weights, weights) and _takes(row.activations, activations)]
    row = next((row for row in fitting if packing in row.packings), None)
    if row is None:
        stored = ", ".join(sorted({p for r in fitting for p in r.packings}))
        why = f"takes this combination only as {stored}" if stored else "has no scheme for this combination"
        return EngineFit("vLLM", None, (why,))
    odd_group = weights.kind == "int" and weights.group is not None and weights.group not in _FAST_GROUPS
    warning = (
        (f"group size {weights.group} is outside 32, 64, 128 and -1: most kernels refuse it",) if odd_group else ()
    )
    return EngineFit("vLLM", row.loads_as, row.limits + warning)


def _transformers(weights: Numbers, packing: str) -> EngineFit:
    """transformers 5.23 with compressed-tensors 0.20, as seen by loading checkpoints of both writers."""
    if packing == "pack-quantized" and not weights.symmetric:
        why = "its loader expects unpacked zero points, for files of any writer: use qkit.load, or --export qkit"
        return EngineFit("transformers + compressed-tensors", None, (why,))
    limits = []
    if weights.scale in ("e4m3", "e8m0"):
        limits.append("in bfloat16 only; NVFP4 experts load without their global scales and are wrong")
    dense = weights.kind == "int" and weights.bits in (3, 5, 6, 7)
    newer = ("needs a compressed-tensors release newer than May 2026, when this packing changed",) if dense else ()
    slow = "decompressed on the first forward pass: correct, at the memory and speed of the full-precision model"
    return EngineFit("transformers + compressed-tensors", "compressed-tensors quantizer", (slow, *newer, *limits))


def holds_siglip(config: Mapping[str, Any], linears: Iterable[str]) -> bool:
    """Whether some of these linears, by checkpoint name, are inside a SigLIP tower."""
    vision = config.get("vision_config")
    siglip = isinstance(vision, dict) and str(vision.get("model_type")).startswith("siglip")
    return siglip and any("vision_tower." in name or "vision_model." in name for name in linears)


def of_diffusion(config: Mapping[str, Any]) -> list[EngineFit]:
    """A diffusion transformer, whatever its formats: diffusers has no compressed-tensors backend of its own. Of any other
    model nothing."""
    name, refuses = config.get("_class_name"), "without the import diffusers refuses to load it"
    return [EngineFit("diffusers", f"{name} after 'import qkit'", (refuses,))] if name else []


def preflight(
    weights: Numbers,
    activations: Numbers | None,
    packing: str,
    method: str = "compressed-tensors",
    siglip: bool = False,
) -> list[EngineFit]:
    """How each engine takes linears of these formats, stored in ``packing`` under ``quant_method`` ``method``.

    siglip: of a checkpoint with a packed SigLIP tower
    """
    own = EngineFit("qkit", "qkit.loading", ())
    if method != "compressed-tensors":
        why = (f"does not know quant_method '{method}'",)
        return [EngineFit("vLLM", None, why), EngineFit("transformers", None, ("only after 'import qkit'",)), own]
    stock = _transformers(weights, packing)
    if siglip:
        asks = "its SigLIP asks every linear of the tower for a plain weight: use qkit.load, or --target vision=skip"
        stock = EngineFit(stock.engine, None, (asks,))
    return [_vllm(weights, activations, packing), stock, own]
