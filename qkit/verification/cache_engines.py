"""What engines do with the static scales of a KV cache that a result has (read in vLLM 0.32 and compressed-tensors 0.20.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

_HEADS = (
    "its cache takes a scale for each head with FlashAttention 3 and 4 alone, and other GPUs are refused; on CPUs it takes the "
    "largest scale of a layer"
)
_NVFP4 = "it reads no NVFP4 scales of a KV cache and refuses the file: use --kv fp8, whose scales its nvfp4 cache takes as well"
_PLAIN = "it does not use the scales of the KV cache, which stays in 16 bits"

F = TypeVar("F", bound=Any)  # a row of an engine: engine, loads_as, limits


def cache_kind(config: Mapping[str, Any]) -> str:
    """The kind of cache (as in qkit.json) whose scales config.json asks for; empty where it asks for none."""
    quantization = config.get("quantization_config")
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
    if not isinstance(scheme, Mapping):
        return ""
    if scheme.get("num_bits") != 8:
        return "nvfp"
    return "fp-head" if scheme.get("strategy") == "attn_head" else "fp"


def with_cache(fits: Iterable[F], kind: str) -> list[F]:
    """How engines load a result whose KV cache has static scales of a kind (of none where it is empty)."""
    return [_with_cache(fit, kind) if kind else fit for fit in fits]


def _with_cache(fit: F, kind: str) -> F:
    if fit.loads_as is None:
        return fit
    if fit.engine.startswith("vLLM"):
        if kind == "nvfp":
            return replace(fit, loads_as=None, limits=(_NVFP4,))
        return replace(fit, limits=(*fit.limits, _HEADS)) if kind == "fp-head" else fit
    return replace(fit, limits=(*fit.limits, _PLAIN)) if fit.engine.startswith("transformers") else fit
