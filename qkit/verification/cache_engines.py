"""What engines do with the static scales of a KV cache that a result has (read in vLLM 0.32 and compressed-tensors 0.20.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from qkit.verification.engine_types import EngineFit
from qkit.verification.vllm_table import CPU

# Its FlashAttention has these versions of itself for these GPUs, and FlashAttention 2, without such scales, for all others.
_HEADS = {"sm90": "FlashAttention 3", "sm100": "FlashAttention 4"}
_OTHERS = "a KV cache with a scale for each head needs FlashAttention 3 or 4: use --kv fp8"
_ON_CPUS = "on CPUs its cache takes the largest scale of a layer in place of one for each head"
_NVFP4 = "it reads no NVFP4 scales of a KV cache and refuses the file: use --kv fp8, whose scales its nvfp4 cache takes as well"
_PLAIN = "it does not use the scales of the KV cache, which stays in 16 bits"


def cache_kind(config: Mapping[str, Any]) -> str:
    """The kind of cache (as in qkit.json) whose scales config.json asks for; empty where it asks for none."""
    quantization = config.get("quantization_config")
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
    if not isinstance(scheme, Mapping):
        return ""
    if scheme.get("num_bits") != 8:
        return "nvfp"
    return "fp-head" if scheme.get("strategy") == "attn_head" else "fp"


def with_cache(fits: Iterable[EngineFit], kind: str, asked: Iterable[str]) -> list[EngineFit]:
    """How engines load a result whose KV cache has static scales of a kind (of none where it is empty). asked: the kinds of
    GPU, or "cpu", that are asked for"""
    return [_with_cache(fit, kind, asked) if kind else fit for fit in fits]


def _with_cache(fit: EngineFit, kind: str, asked: Iterable[str]) -> EngineFit:
    if fit.loads_as is None:
        return fit
    if fit.engine.startswith("vLLM"):
        if kind == "nvfp":
            return replace(fit, loads_as=None, limits=(_NVFP4,), platforms=())
        return _with_heads(fit, asked) if kind == "fp-head" else fit
    return replace(fit, limits=(*fit.limits, _PLAIN)) if fit.engine.startswith("transformers") else fit


def _with_heads(fit: EngineFit, asked: Iterable[str]) -> EngineFit:
    """The answer of vLLM for a cache with a scale for each head."""
    left = tuple(gpu for gpu in fit.platforms if gpu in (*_HEADS, CPU))
    lost = ", ".join(gpu for gpu in asked if gpu not in (*_HEADS, CPU))
    kernels = {gpu: counts if gpu in (*_HEADS, CPU) else {f"refused: {_OTHERS}": sum(counts.values())}
               for gpu, counts in fit.kernels.items()}  # fmt: skip
    refusal = (f"not on {lost}: {_OTHERS}",) if lost else ()
    if not left:
        return replace(fit, loads_as=None, limits=refusal or (_OTHERS,), platforms=(), kernels=kernels)
    runs = ", ".join(f"{gpu} with {_HEADS[gpu]}" for gpu in left if gpu in _HEADS)
    notes = [f"its KV cache runs on {runs}"] if runs else []
    notes += [_ON_CPUS] if CPU in left else []
    return replace(fit, limits=(*fit.limits, *notes, *refusal), platforms=left, kernels=kernels)
