"""A static table of which engine loads which format: the answer needs no engine and takes no time.

The vLLM rows restate the compressed-tensors dispatcher of vLLM 0.32, which was run on CPUs and whose selection of kernels
was asked for GPUs; what is said of transformers was seen by loading files. ``engines`` puts these rows together for a whole
model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_VLLM, _STOCK = "vLLM", "transformers + compressed-tensors"


class NumberFormat(Protocol):
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
    def block(self) -> tuple[int, int] | None: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def scale(self) -> str: ...
    @property
    def dynamic(self) -> bool: ...


@dataclass(frozen=True)
class EngineFit:
    """How one engine loads a combination of formats. ``loads_as`` None: it does not; ``limits``: the reason, or limits to
    know."""

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
    pattern = {"kind": (kind,), "bits": (bits,), "strategy": strategies, "symmetric": (True,), "dynamic": (True,)}
    return {**pattern, "scale": ("model",)}


_2_TO_8 = (2, 3, 4, 5, 6, 7, 8)
_ANY: tuple[Pattern | None, ...] = (None, {})
_EITHER = (True, False)
_FP8: Pattern = {"kind": ("fp8",), "strategy": ("tensor", "channel", "block"), "scale": ("model",)}
_NVFP4: Pattern = {"kind": ("fp4",), "scale": ("e4m3",), "group": (16,)}
_STATIC_FP8: Pattern = {"kind": ("fp8",), "strategy": ("tensor",), "dynamic": (False,)}
_SPLIT = "the group size has to divide the input columns of every tensor-parallel rank"
_NO_CPU, _CPU_TOO = "no kernel for CPUs", "runs on CPUs too"
_NO_CPU_EXPERTS = "experts have no kernel for CPUs"
_NEVER_ON_CPU = "does not run on CPUs"
_W4A8_FP8 = "sm90 only: no other GPU and no CPU loads it"
_A16_IGNORED = "vLLM does not see that inputs are to stay as they are, and quantizes them too on Blackwell"

VLLM_NAME, STOCK, SPLIT, NO_CPU, CPU_TOO = _VLLM, _STOCK, _SPLIT, _NO_CPU, _CPU_TOO  # also said of other layouts

VLLM = (
    _Row(_int(_2_TO_8, "group", "channel", symmetric=_EITHER), (None,), ("pack-quantized",), "CompressedTensorsWNA16"),
    _Row(
        _int(_2_TO_8, "group", "channel", symmetric=_EITHER),
        (_dynamic("int", 8, "token", "group"),),
        ("pack-quantized",),
        "CompressedTensorsWNA8Int",
        (
            "sm75 or newer",
            "on CPUs inputs stay in 16 bits",
            "on GPUs vLLM picks Marlin or Machete before Humming, its kernel with INT8 inputs",
        ),
    ),
    _Row(
        _int(_2_TO_8, "group", "channel"),
        (_dynamic("int", 4, "token", "group"),),
        ("pack-quantized",),
        "CompressedTensorsWNA4Int",
        ("sm75 or newer", "runs on GPUs with Humming", _NO_CPU),
    ),
    _Row(
        _int((4,), "group", "channel"),
        (_dynamic("int", 8, "token"),),
        ("int-quantized",),
        "CompressedTensorsW4A8Int",
        ("legacy path that stores one byte per weight: export as pack-quantized",),
    ),
    _Row(
        {**_int((4,), "group"), "group": (128,)},
        (_dynamic("fp8", 8, "token"),),
        ("pack-quantized",),
        "CompressedTensorsW4A8Fp8",
        (_W4A8_FP8, "128 has to divide input columns and output rows"),
    ),
    _Row(
        _int((8,), "tensor", "channel"),
        (_dynamic("int", 8, "token"), {"kind": ("int",), "bits": (8,), "strategy": ("tensor",), "dynamic": (False,)}),
        ("int-quantized",),
        "CompressedTensorsW8A8Int8",
    ),
    _Row(
        _FP8,
        (_dynamic("fp8", 8, "token", "tensor", "group"), _STATIC_FP8),
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
        ("computes in FP4 on Blackwell, weight-only on other GPUs", _NO_CPU),
    ),
    _Row(_NVFP4, (None,), ("nvfp4-pack-quantized",), "CompressedTensorsW4A4Fp4 (use_a16)", (_NO_CPU,)),
    _Row(
        {"kind": ("fp4",), "scale": ("e8m0",)},
        _ANY,
        ("mxfp4-pack-quantized",),
        "CompressedTensorsW4A4Mxfp4",
        (_NO_CPU,),
    ),
    _Row({"kind": ("fp8",), "scale": ("e8m0",)}, _ANY, ("mxfp8-quantized",), "CompressedTensorsW8A8Mxfp8", (_NO_CPU,)),
)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Properties of a model, beside the formats of some linears, that decide which engine loads them.

    model_type: of config.json, or of the language model inside; kind: the class of the model; images: whether it
    reads images
    experts: whether some of the linears are experts; siglip: whether a SigLIP tower of the model is packed; uses: of a matrix
    outside the blocks, "embeddings", "head" or both
    torn, uneven: of the whole model, the first linears that vLLM loads as one and that have several formats, or rows that
    a block does not divide; torn_experts: the first layer whose experts have several formats; several_experts: whether the
    experts of the whole model have; refusal: why stock transformers does not load the model, where its writer knew
    """

    model_type: str = ""
    kind: str = ""
    images: bool = False
    experts: bool = False
    siglip: bool = False
    torn: str = ""
    uneven: str = ""
    torn_experts: str = ""
    several_experts: bool = False
    refusal: str = ""
    uses: tuple[str, ...] = ()


_NOTHING = ModelFacts()


def without_cpu(limits: Iterable[str]) -> bool:
    """Whether limits of an engine say that it has nothing for CPUs."""
    return not {_NO_CPU, _NO_CPU_EXPERTS, _NEVER_ON_CPU, _W4A8_FP8}.isdisjoint(limits)


def _matches(pattern: Pattern, numbers: NumberFormat) -> bool:
    return all(getattr(numbers, name) in allowed for name, allowed in pattern.items())


def _takes(alternatives: tuple[Pattern | None, ...], activations: NumberFormat | None) -> bool:
    if activations is None:
        return None in alternatives
    return any(pattern is not None and _matches(pattern, activations) for pattern in alternatives)


def _vllm(weights: NumberFormat, activations: NumberFormat | None, packing: str, facts: ModelFacts) -> EngineFit:
    """vLLM 0.32, as seen on CPUs; for GPUs what its own code selects."""
    if "embeddings" in facts.uses:
        return _vllm_embeddings(weights, facts)
    refusal = _vllm_refuses(weights, activations, facts)
    fitting = [row for row in VLLM if _matches(row.weights, weights) and _takes(row.activations, activations)]
    row = next((row for row in fitting if packing in row.packings), None)
    if refusal is None and row is None:
        stored = ", ".join(sorted({p for r in fitting for p in r.packings}))
        refusal = f"it takes this combination only as {stored}" if stored else "it has no scheme for this combination"
    if refusal is not None or row is None:
        return EngineFit(_VLLM, None, (str(refusal),))
    limits = [*row.limits]
    if row.loads_as == "CompressedTensorsWNA16":
        limits += _kernel(weights)
    if weights.kind == "int" and weights.group is not None:
        limits.append(_SPLIT)
    if row.loads_as == "CompressedTensorsW8A8Fp8":
        if activations is not None and not activations.dynamic:
            limits.append(_NEVER_ON_CPU)
        elif weights.strategy == "block":
            limits.append("on CPUs it needs AMX")
    if weights.scale == "e8m0" and activations is None:
        limits.append(_A16_IGNORED)
    if facts.experts and _NO_CPU not in limits:
        limits = [x for x in limits if x != _CPU_TOO]
        limits.append(_NO_CPU_EXPERTS)
    decoders = ("ForCausalLM", "LMHeadModel", *(("ForConditionalGeneration",) if facts.images else ()))
    if facts.kind and not facts.kind.endswith(decoders):
        limits.append(f"whether it has the class {facts.kind} was not checked")
    return EngineFit(_VLLM, row.loads_as, tuple(limits))


def _vllm_embeddings(weights: NumberFormat, facts: ModelFacts) -> EngineFit:
    """vLLM's lookup of packed rows (CompressedTensorsEmbeddingWNA16Int, since 0.29), as its source says; it was not run."""
    if "head" in facts.uses:
        return EngineFit(
            _VLLM, None, ("it cannot multiply with packed embeddings, and the output head is tied to them",)
        )
    if weights.kind != "int" or not weights.symmetric or weights.bits not in (2, 4, 8):
        return EngineFit(_VLLM, None, ("it looks embeddings up in int2, int4 or int8 alone",))
    limits = ("embeddings: its class for this model has to pass the quantization on to them", _NO_CPU)
    return EngineFit(_VLLM, "CompressedTensorsEmbeddingWNA16Int", limits)


def _vllm_refuses(weights: NumberFormat, activations: NumberFormat | None, facts: ModelFacts) -> str | None:
    """Why vLLM does not load a file for what is beside the formats that it has schemes for."""
    if facts.torn_experts:
        return f"it runs the experts of a layer as one product, and those of {facts.torn_experts} have several formats"
    if facts.torn:
        return f"it loads {facts.torn} as one, and their formats differ"
    if facts.uneven:
        return f"it loads {facts.uneven}, and a block of rows would belong to both"
    if activations is not None and weights.kind == "int" and weights.bits < 8:
        if activations.kind == "fp8" and weights.group != 128:
            return "it loads INT4 weights with FP8 inputs in groups of 128 alone"
        if activations.kind == "int" and facts.experts:
            return "it expects experts of this scheme with one byte for each weight"
    return None


def _kernel(weights: NumberFormat) -> Iterator[str]:
    """What runs integers with inputs in 16 bits, as vLLM's own function chooses it."""
    group, common = weights.group, (32, 64, 128, None)
    if weights.bits not in (4, 8):
        yield "runs on GPUs with Humming"
    elif group not in common:
        yield f"runs on GPUs with {'TritonW4A16 (sm90: Humming)' if group == 256 and weights.bits == 4 else 'Humming alone'}"
        if group is not None and group & (group - 1):
            yield f"a group size of {group} does not fit Humming's tiles, and the result may be wrong: use 32, 64, 128 or -1"
    elif weights.bits == 8 and not weights.symmetric:
        yield "runs on GPUs with Humming (sm90: Machete)"
    else:
        yield f"runs on GPUs with Marlin (sm90: {'Humming' if group == 32 else 'Machete'})"
    yield _CPU_TOO if weights.bits == 4 else _NO_CPU


def _transformers(
    weights: NumberFormat, activations: NumberFormat | None, packing: str, facts: ModelFacts
) -> EngineFit:
    """transformers 5.24 with compressed-tensors 0.20, as seen by loading checkpoints of both writers."""
    refusal = _transformers_refuses(weights, activations, packing, facts)
    if refusal is not None:
        return EngineFit(_STOCK, None, (refusal,))
    limits = ["decompressed on the first forward pass: correct, at the memory and speed of the full-precision model"]
    if weights.kind == "int" and weights.bits in (3, 5, 6, 7):
        limits.append("needs a compressed-tensors release newer than May 2026, when this packing changed")
    if weights.scale in ("e4m3", "e8m0"):
        limits.append("in bfloat16 only")
    if facts.model_type == "ctrl":
        limits.append("in float32 only")
    if activations is not None and facts.experts:
        limits.append("inputs of experts are not rounded")
    if activations is not None and activations.strategy == "token" and facts.model_type == "opt":
        limits.append("rounds all tokens with one scale, less exactly than the file says: OPT flattens its inputs")
    return EngineFit(_STOCK, "compressed-tensors quantizer", tuple(limits))


def _transformers_refuses(
    weights: NumberFormat, activations: NumberFormat | None, packing: str, facts: ModelFacts
) -> str | None:
    if "embeddings" in facts.uses:
        return "it asks quantized embeddings for a plain weight, which packed ones have not: use qkit.load, or --export qkit"
    if facts.siglip:
        return "its SigLIP asks every linear of the tower for a plain weight: use qkit.load, or --target vision=skip"
    if packing == "pack-quantized" and not weights.symmetric:
        return "its loader expects unpacked zero points, for files of any writer: use qkit.load, or --export qkit"
    if facts.several_experts:
        return "it loads all experts in one format, and these have several, which fails or gives wrong weights: use qkit.load"
    if facts.experts and weights.scale == "e4m3":
        return "it loads NVFP4 experts without their global scales, which makes them wrong: use qkit.load"
    if facts.experts and (packing in ("int-quantized", "mxfp8-quantized") or weights.strategy == "block"):
        return "it has no loader for experts of this scheme: use qkit.load"
    return facts.refusal or None


def holds_siglip(config: Mapping[str, Any], linears: Iterable[str]) -> bool:
    """Whether some of these linears, by checkpoint name, are inside a SigLIP tower."""
    vision = config.get("vision_config")
    siglip = isinstance(vision, dict) and str(vision.get("model_type")).startswith("siglip")
    return siglip and any("vision_tower." in name or "vision_model." in name for name in linears)


def diffusion_fit(config: Mapping[str, Any]) -> list[EngineFit]:
    """The engine line of a diffusion transformer, whatever its formats: diffusers has no compressed-tensors backend of its
    own. Empty for any other model."""
    name, refuses = config.get("_class_name"), "without the import diffusers refuses to load it"
    return [EngineFit("diffusers", f"{name} after 'import qkit'", (refuses,))] if name else []


def engine_fits(
    weights: NumberFormat,
    activations: NumberFormat | None,
    packing: str,
    method: str = "compressed-tensors",
    facts: ModelFacts = _NOTHING,
) -> list[EngineFit]:
    """The answer of each engine for linears of these formats, stored in ``packing`` under ``quant_method`` ``method``."""
    qkit_fit = EngineFit("qkit", "qkit.load", ())
    if method != "compressed-tensors":
        unknown_method = (f"it does not know quant_method '{method}'",)
        return [
            EngineFit(_VLLM, None, unknown_method),
            EngineFit(_STOCK, None, (*unknown_method, "'import qkit' teaches it to transformers")),
            qkit_fit,
        ]
    return [_vllm(weights, activations, packing, facts), _transformers(weights, activations, packing, facts), qkit_fit]
