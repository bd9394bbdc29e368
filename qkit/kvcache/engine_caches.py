"""The KV caches of vLLM (``--kv-cache-dtype``) as arithmetic: what a cache holds of keys and values.

Read in vLLM 0.32. Left out are its caches for latent attention, and those with learned codebooks (turboquant, ultraquant).
vLLM writes keys and values into the cache first and attends to what it reads back, so in ``read_back.ReadBackCache`` one
pass over a text computes what serving computes. What GPUs round beside the cache is left out: FlashAttention 3 and FlashInfer
round queries to FP8 too where the cache is FP8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkit.kvcache.float4 import NVFP4
from qkit.kvcache.read_back import Held, held
from qkit.kvcache.scales import Scale, scales_of
from qkit.tensor.activations import quantize_activations
from qkit.tensor.input_transform import hadamard

PLAIN = "auto"
_SIGNS_SEED = 0x9E3779B9  # of vLLM's INT4 cache
_LEAST = 1e-6  # the least scale of a token there
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


@dataclass(frozen=True, kw_only=True)
class EngineCache:
    """A cache of vLLM. name: of --kv-cache-dtype; number: bytes of a number; token: bytes of scales for a head's token; runs:
    where vLLM 0.32 has it; everywhere: whether that is on all its GPUs from sm80 on; multiple: of which heads need channels
    """

    name: str
    number: float
    token: int = 0
    runs: str
    everywhere: bool = True
    multiple: int = 1

    def bytes_of(self, head_dim: int) -> float:
        """Bytes of the keys, or of the values, of one token in one head."""
        return self.number * head_dim + self.token


_TRITON = "GPUs, with Triton attention"
ENGINE_CACHES = {
    c.name: c
    for c in (
        EngineCache(name=PLAIN, number=2.0, runs="everywhere"),
        EngineCache(name="fp8", number=1.0, runs="GPUs and CPUs"),
        EngineCache(name="fp8_e5m2", number=1.0, runs="CPUs, and GPUs with Triton attention or FlashInfer"),
        EngineCache(name="fp8_per_token_head", number=1.0, token=4, runs=_TRITON),
        EngineCache(name="int8_per_token_head", number=1.0, token=4, runs=_TRITON),
        EngineCache(
            name="nvfp4",
            number=0.5 + 1 / 16,
            runs="GPUs with FlashInfer; heads of 64 channels on sm100 alone",
            everywhere=False,
            multiple=16,
        ),
        EngineCache(name="int4_per_token_head", number=0.5, token=4, runs=_TRITON, multiple=2),
    )
}


def refusal(name: str, kind: str | None, head_dim: int) -> str:
    """Why vLLM does not serve a file with this cache; empty where it does. kind: of the file's static scales."""
    cache = ENGINE_CACHES[name]
    if head_dim % cache.multiple:
        return f"heads of {head_dim} channels are no multiple of {cache.multiple}"
    if kind is not None and name == "fp8_e5m2":
        return "vLLM refuses it for a file with scales of an FP8 cache"
    if kind == "fp-head" and name not in (PLAIN, "fp8"):
        return "vLLM takes a scale for each head with fp8 alone"
    return ""


def held_layers(model: Any, name: str, kind: str | None, layers: int, skip: frozenset[int] = frozenset()) -> list[Held]:
    """What a cache holds in each layer, as a function of keys (side 0) or values (side 1); None for a layer in 16 bits.

    kind: of the static scales that are used ("fp", "fp-head"), None for scales of 1
    """
    scales: list[tuple[Scale, Scale]] = [(1.0, 1.0)] * layers if kind is None else scales_of(model, layers, kind)
    return [None if name == PLAIN or i in skip else partial(_held, name, scales[i]) for i in range(layers)]


def _held(name: str, scales: tuple[Scale, Scale], x: Tensor, side: int) -> Tensor:
    if name == "fp8":
        return held(x, scales[side])
    if name == "nvfp4":
        multiplier = 1 / torch.as_tensor(scales[side], dtype=torch.float32).max().reshape(1)
        return quantize_activations(x, NVFP4, multiplier.to(x.device))
    return _TOKENS[name](x)


def _e5m2(x: Tensor) -> Tensor:
    kind = torch.float8_e5m2
    return x.float().clamp(-_LARGEST[kind], _LARGEST[kind]).to(kind).to(x.dtype)


def _per_token(x: Tensor, largest: float, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """A scale for each token of each head."""
    values = x.float()
    scale = (values.abs().amax(-1, keepdim=True) / largest).clamp(min=_LEAST)
    return (rounded((values * (1 / scale)).clamp(-largest, largest)) * scale).to(x.dtype)


def _int8(x: Tensor) -> Tensor:
    return (x + x.sign() * 0.5).trunc()  # half away from zero


def _fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def _int4(x: Tensor) -> Tensor:
    """Random signs and a Hadamard transform, then 16 steps between the least and the largest number of a token and a head."""
    size = x.shape[-1]
    block = size & -size
    draw = torch.Generator().manual_seed(_SIGNS_SEED)
    signs = (2.0 * torch.bernoulli(torch.full((block,), 0.5), generator=draw) - 1.0).to(x.device)
    norm = block**0.5  # vLLM does not divide by it
    signed = (x.float().unflatten(-1, (-1, block)) * signs).flatten(-2)
    turned = (hadamard(signed, block) * norm).to(x.dtype).float()
    low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=_LEAST)
    zero = _int8(-low / scale).clamp(0, 15)
    codes = _int8(turned * (1 / scale) + zero).clamp(0, 15)
    stored = (scale.view(torch.int32) & -16 | zero.to(torch.int32)).view(
        torch.float32
    )  # the zero point is in its last bits
    back = hadamard((codes - zero) * stored, block) / norm
    signed_back: Tensor = back.unflatten(-1, (-1, block)) * signs
    return signed_back.flatten(-2).to(x.dtype)


_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp8_e5m2": _e5m2,
    "fp8_per_token_head": partial(_per_token, largest=_LARGEST[torch.float8_e4m3fn], rounded=_fp8),
    "int8_per_token_head": partial(_per_token, largest=127.0, rounded=_int8),
    "int4_per_token_head": _int4,
}
