"""Which engine loads GPTQ, AWQ and ModelOpt: a static table, as ``engines`` has one for compressed-tensors.

The vLLM rows restate its classes ``AutoGPTQConfig``, ``AutoAWQConfig`` and ``ModelOpt*Config`` of version 0.32, of which the
first two were run on CPUs; transformers 5.24 loads GPTQ and AWQ with the package gptqmodel, and has no class for ModelOpt.
"""

from __future__ import annotations

from collections.abc import Iterator

from qkit.verification.engine_types import OWN, PLATFORMS, STOCK_TABLE, VLLM_TABLE, EngineFit, ModelFacts
from qkit.verification.engines import STOCK
from qkit.verification.vllm_fit import CPU_TOO, NO_CPU, SPLIT, VLLM
from qkit.verification.vllm_table import CPU, NumberFormat

LAYOUTS = ("gptq", "awq", "modelopt")
_GPTQMODEL = "needs the packages gptqmodel and optimum"
_LISTED = (32, 64, 128, None)


def layout_fits(
    weights: NumberFormat,
    activations: NumberFormat | None,
    packing: str,
    method: str,
    facts: ModelFacts,
) -> list[EngineFit]:
    """The answer of each engine for linears of these formats in one of LAYOUTS."""
    return [
        _vllm(weights, activations, packing, method, facts),
        _transformers(method, facts),
        EngineFit("qkit", "qkit.load", (), OWN),
    ]


def _vllm(
    weights: NumberFormat, activations: NumberFormat | None, packing: str, method: str, facts: ModelFacts
) -> EngineFit:
    if facts.torn:
        return _refused(f"it loads {facts.torn} as one, and their formats differ")
    if facts.torn_experts:
        why = f"it runs the experts of a layer as one product, and those of {facts.torn_experts} have several formats"
        return _refused(why)
    if method == "gptq" and (weights.bits not in (4, 8) or packing == "gptq_v2"):
        stored = "files without zero points" if weights.bits in (4, 8) else "4 and 8 bits"
        return _refused(f"of GPTQ it loads {stored} alone")
    name, limits = _loaded(weights, activations, method, facts)
    on_cpu = NO_CPU not in limits
    return EngineFit(VLLM, name, limits, VLLM_TABLE, tuple(p for p in PLATFORMS if p != CPU or on_cpu))


def _refused(why: str) -> EngineFit:
    return EngineFit(VLLM, None, (why,), VLLM_TABLE)


def _loaded(
    weights: NumberFormat, activations: NumberFormat | None, method: str, facts: ModelFacts
) -> tuple[str, tuple[str, ...]]:
    if method == "modelopt":
        kind = "NVFP4" if weights.kind == "fp4" else "MXFP8" if weights.scale == "e8m0" else "FP8"
        return f"ModelOptLinearMethod ({kind}{'' if activations else ', weights alone'})", (NO_CPU,)
    name = "AutoGPTQLinearMethod" if method == "gptq" else "AutoAWQMarlinLinearMethod"
    return name, tuple(_limits(weights, facts))


def _limits(weights: NumberFormat, facts: ModelFacts) -> Iterator[str]:
    if weights.group not in _LISTED:
        yield "Marlin takes groups of 32, 64, 128 and whole channels"
    yield CPU_TOO if weights.bits == 4 and not facts.experts else NO_CPU
    if weights.group is not None:
        yield SPLIT


def _transformers(method: str, facts: ModelFacts) -> EngineFit:
    if method == "modelopt":
        return EngineFit(STOCK, None, ("it has no class for ModelOpt",), STOCK_TABLE)
    if facts.refusal:
        return EngineFit(STOCK, None, (facts.refusal,), STOCK_TABLE)
    return EngineFit(STOCK, f"{method.upper()} quantizer", (_GPTQMODEL,), STOCK_TABLE)
