"""Which engine loads GPTQ, AWQ, ModelOpt and MLX: a static table, as ``engines`` has one for compressed-tensors.

The vLLM rows restate its classes ``AutoGPTQConfig``, ``AutoAWQConfig`` and ``ModelOpt*Config`` of version 0.32, of which the
first two were run on CPUs. Those two hand their layers to the chooser of kernels that compressed-tensors asks (its
``choose_mp_linear_kernel``, and ``select_wna16_moe_backend`` for experts), so the table of the latter names their kernels.
ModelOpt has rows of its own in that table.
transformers 5.24 loads GPTQ and AWQ with the package gptqmodel, and has no class for ModelOpt. MLX's layout is for mlx_lm
(``mlx_table``).
"""

from __future__ import annotations

from dataclasses import replace

from qkit.verification.engine_types import OWN, STOCK_TABLE, VLLM_TABLE, EngineFit, ModelFacts, Selected
from qkit.verification.engines import STOCK
from qkit.verification.mlx_table import mlx_fit
from qkit.verification.vllm_fit import CPU_TOO, NO_CPU, SPLIT, VLLM, vllm_fit
from qkit.verification.vllm_table import CPU, NumberFormat

LAYOUTS = ("gptq", "awq", "modelopt", "mlx")
_GPTQMODEL = "needs the packages gptqmodel and optimum"
_UNKNOWN = "it does not know quant_method 'mlx'"
_LISTED = (32, 64, 128, None)
# Models that vLLM does not run in float16 (its _FLOAT16_NOT_SUPPORTED_MODELS), and the GPU without bfloat16.
_NOT_FLOAT16, _NO_BFLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4"), "sm75"
_GROUPS = "Marlin takes groups of 32, 64, 128 and whole channels alone"


def layout_fits(
    weights: NumberFormat,
    activations: NumberFormat | None,
    packing: str,
    method: str,
    facts: ModelFacts,
    selected: Selected | None = None,
) -> list[EngineFit]:
    """The answer of each engine for linears of these formats in one of LAYOUTS. selected: as for ``vllm_fit``"""
    if method == "mlx":
        return [
            mlx_fit(weights, facts),
            _refused(_UNKNOWN),
            EngineFit(STOCK, None, (_UNKNOWN,), STOCK_TABLE),
            EngineFit("qkit", "qkit.load", (), OWN),
        ]
    vllm = _vllm(weights, activations, packing, method, facts, selected)
    return [
        vllm if selected is not None else _in_16_bits(vllm, method, facts),
        _transformers(method, facts),
        EngineFit("qkit", "qkit.load", (), OWN),
    ]


def _in_16_bits(fit: EngineFit, method: str, facts: ModelFacts) -> EngineFit:
    """The fit, without the GPUs on which vLLM computes a model in float32, which its classes for these layouts refuse."""
    if facts.model_type not in _NOT_FLOAT16 or _NO_BFLOAT16 not in fit.platforms:
        return fit
    why = f"it computes {facts.model_type} in float32 on {_NO_BFLOAT16}, and its class for {method} does not"
    platforms = tuple(p for p in fit.platforms if p != _NO_BFLOAT16)
    layers = sum(fit.kernels[_NO_BFLOAT16].values())
    kernels = {**fit.kernels, _NO_BFLOAT16: {f"refused: {why}": layers}}
    if not platforms:
        return replace(fit, loads_as=None, limits=(why,), platforms=(), kernels=kernels)
    limits = (*fit.limits, f"not on {_NO_BFLOAT16}: {why}")
    return replace(fit, limits=limits, platforms=platforms, kernels=kernels)


def _vllm(
    weights: NumberFormat,
    activations: NumberFormat | None,
    packing: str,
    method: str,
    facts: ModelFacts,
    selected: Selected | None,
) -> EngineFit:
    if method == "modelopt":
        return _modelopt(weights, activations, facts, selected)
    if method == "gptq" and (weights.bits not in (4, 8) or packing == "gptq_v2"):
        stored = "files without zero points" if weights.bits in (4, 8) else "4 and 8 bits"
        return _refused(f"of GPTQ it loads {stored} alone")
    if method == "gptq" and weights.group not in _LISTED:
        return _refused(_GROUPS)
    # The same layers, kernels and limits as in compressed-tensors, under another class.
    fit = vllm_fit(weights, None, "pack-quantized", facts, selected)
    if fit.loads_as is None or selected is not None:
        return fit
    if weights.group not in _LISTED:
        return _own_kernels(fit, facts)
    name = {"gptq": "AutoGPTQ{}Method", "awq": "AutoAWQ{}Method"}[method]
    kind = "MoE" if facts.experts else "Linear" if method == "gptq" else "MarlinLinear"
    return replace(fit, loads_as=name.format(kind), limits=tuple(x for x in fit.limits if ": loads as " not in x))


def _own_kernels(fit: EngineFit, facts: ModelFacts) -> EngineFit:
    """AWQ in groups that Marlin does not take. fit: what the table says of such groups, which holds for CPUs"""
    gpus = tuple(p for p in facts.platforms if p != CPU)
    on_cpu = (CPU,) if CPU in fit.platforms else ()
    runs = f"runs on GPUs with its own AWQ kernels: {_GROUPS}"
    limits = (runs, *(x for x in fit.limits if x in (CPU_TOO, NO_CPU, SPLIT)))
    kernels = {
        p: {"AutoAWQLinearMethod": sum(fit.kernels[p].values())} if p in gpus else fit.kernels[p] for p in fit.kernels
    }
    return replace(fit, loads_as="AutoAWQLinearMethod", limits=limits, platforms=(*gpus, *on_cpu), kernels=kernels)


def _modelopt(
    weights: NumberFormat, activations: NumberFormat | None, facts: ModelFacts, selected: Selected | None
) -> EngineFit:
    if weights.kind == "int" or (weights.kind == "fp4" and weights.scale == "e8m0"):
        return _refused("of ModelOpt it loads FP8, NVFP4, W4A16_NVFP4 and MXFP8 alone")
    if facts.experts and weights.strategy in ("channel", "block"):
        return _refused("of experts in ModelOpt's FP8 it loads those with one scale for a weight alone")
    fit = vllm_fit(weights, activations, "modelopt", facts, selected)
    if fit.loads_as is None or facts.experts:
        return fit
    kind = "NVFP4" if weights.kind == "fp4" else "MXFP8" if weights.scale == "e8m0" else "FP8"
    return replace(fit, loads_as=f"{fit.loads_as} ({kind}{'' if activations else ', weights alone'})")


def _refused(why: str) -> EngineFit:
    return EngineFit(VLLM, None, (why,), VLLM_TABLE)


def _transformers(method: str, facts: ModelFacts) -> EngineFit:
    if method == "modelopt":
        return EngineFit(STOCK, None, ("it has no class for ModelOpt",), STOCK_TABLE)
    if facts.refusal:
        return EngineFit(STOCK, None, (facts.refusal,), STOCK_TABLE)
    return EngineFit(STOCK, f"{method.upper()} quantizer", (_GPTQMODEL,), STOCK_TABLE)
