"""Which engine loads which format: the answers of all engines for linears of one combination of formats.

vLLM's come from its own code (``vllm_fit``). What is said of transformers was seen by loading files, in tables here. No engine
has to be there. ``model_engines`` puts the answers together for a whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qkit.verification.engine_types import OWN, STOCK_TABLE, VLLM_TABLE, EngineFit, ModelFacts, Selected
from qkit.verification.vllm_fit import VLLM, vllm_fit
from qkit.verification.vllm_table import NumberFormat

STOCK = "transformers + compressed-tensors"
_NOTHING = ModelFacts()


def _transformers(
    weights: NumberFormat, activations: NumberFormat | None, packing: str, facts: ModelFacts
) -> EngineFit:
    """transformers 5.24 with compressed-tensors 0.20, as seen by loading checkpoints of both writers."""
    refusal = _transformers_refuses(weights, activations, packing, facts)
    if refusal is not None:
        return EngineFit(STOCK, None, (refusal,), STOCK_TABLE)
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
    return EngineFit(STOCK, "compressed-tensors quantizer", tuple(limits), STOCK_TABLE)


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
    return [EngineFit("diffusers", f"{name} after 'import qkit'", (refuses,), OWN)] if name else []


def engine_fits(
    weights: NumberFormat,
    activations: NumberFormat | None,
    packing: str,
    method: str = "compressed-tensors",
    facts: ModelFacts = _NOTHING,
    selected: Selected | None = None,
) -> list[EngineFit]:
    """The answer of each engine for linears of these formats, stored in ``packing`` under ``quant_method`` ``method``.

    selected: what vLLM's own code said of the model, where it was asked
    """
    qkit_fit = EngineFit("qkit", "qkit.load", (), OWN)
    if method != "compressed-tensors":
        unknown_method = (f"it does not know quant_method '{method}'",)
        return [
            EngineFit(VLLM, None, unknown_method, VLLM_TABLE),
            EngineFit(STOCK, None, (*unknown_method, "'import qkit' teaches it to transformers"), STOCK_TABLE),
            qkit_fit,
        ]
    return [
        vllm_fit(weights, activations, packing, facts, selected),
        _transformers(weights, activations, packing, facts),
        qkit_fit,
    ]
