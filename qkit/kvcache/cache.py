"""A packed cache for a model of transformers, by policy.

cache = make_cache(model, parse("kivi2"))
model.generate(ids, cache=cache)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from qkit.errors import UsageError
from qkit.kvcache.argument import cache_argument
from qkit.kvcache.attention import NAME
from qkit.kvcache.crosslayer import cross_layers
from qkit.kvcache.grouping import check_head_dim
from qkit.kvcache.layer import PackedLayer
from qkit.kvcache.policy import CachePolicy
from qkit.kvcache.scales import Scale, scales_of
from qkit.kvcache.shape import CacheShape
from qkit.kvcache.sliding import SlidingLayer
from qkit.kvcache.xquant import InputLayer, sources


class PackedCache(Cache):  # type: ignore[misc]
    """A transformers cache with a PackedLayer for every layer of a model; ``make_cache`` makes it."""

    def __init__(self, policy: CachePolicy, layers: list[PackedLayer]) -> None:
        super().__init__(layers=layers)
        self.policy = policy

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of a layer. Raises BudgetNotMet before any layer changes, where a later one has no room."""
        if layer_idx == 0:
            for layer in self.layers:
                if layer.budget is not None:
                    layer.refuse_too_many(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache's tensors, scales included."""
        return sum(layer.nbytes for layer in self.layers)

    def draft(self, on: bool) -> None:
        """Read a hierarchical cache at 4 bits (on), or at 8 bits (off)."""
        for layer in self.layers:
            layer.draft = on

    @property
    def widths(self) -> list[int]:
        """Bits of the body of every layer."""
        return [layer.width for layer in self.layers]


def make_cache(model: Any, policy: CachePolicy) -> PackedCache:
    """An empty cache for a model (or its config).

    Raises Unsupported for attention that it does not support, UsageError for a policy that does not suit the model.
    """
    return maker(model, policy)()


def maker(model: Any, policy: CachePolicy) -> Callable[[], PackedCache]:
    """A function that makes empty caches for a model; checks and computations run once. Raises as ``make_cache`` does."""
    heads = CacheShape.of(model, windows=policy.is_static)
    check_head_dim(heads.head_dim, policy)
    if policy.kind == "progressive" and policy.budgets is None:
        raise UsageError(
            f"kv policy {policy.name} has no budget, which its width follows: quantize with it, --kv-memory and "
            "--max-length, or give a cache made with qkit.kvcache.cache.with_budgets(policy, model, length)"
        )
    if policy.budgets is not None and len(policy.budgets) != heads.layers:
        raise UsageError(
            f"kv policy {policy.name} has budgets for {len(policy.budgets)} layers and the model has {heads.layers}: make it "
            "for this model"
        )
    if policy.kind in ("xquant", "xquant-cl"):
        if not isinstance(model, nn.Module):
            return lambda: PackedCache(policy, [])  # all checks of a config were made above
        if policy.kind == "xquant-cl":
            shared_sources = sources(model, heads.head_dim, shared=True)
            return lambda: PackedCache(policy, cross_layers(policy, shared_sources))
        input_sources = sources(model, heads.head_dim)
        return lambda: PackedCache(policy, [InputLayer(policy, s) for s in input_sources])
    budgets = policy.budgets or (None,) * heads.layers
    scales: list[tuple[Scale, Scale]] = [(1.0, 1.0)] * heads.layers
    if policy.is_static and isinstance(model, nn.Module):
        scales = scales_of(model, heads.layers, policy.kind)
    layers = list(zip(heads.windows, budgets, scales, strict=True))

    def make() -> PackedCache:
        packed = _attention(model) == NAME
        made = [
            SlidingLayer(policy, w, s) if w is not None else PackedLayer(policy, b, packed, s) for w, b, s in layers
        ]
        return PackedCache(policy, made)

    return make


def _attention(model: Any) -> str | None:
    """Name of the attention implementation of a model; None for a config."""
    if not isinstance(model, nn.Module):
        return None
    config: Any = model.config
    return getattr(config.get_text_config(decoder=True), "_attn_implementation", None)


def with_budgets(policy: CachePolicy, model: Any, length: int) -> CachePolicy:
    """The policy with a budget for every layer: the bytes of ``length`` tokens of a sequence at the layer's final width.

    Final widths are policy.finals, or the smallest of policy.widths. Only progressive policies have budgets; others are
    returned unchanged. Raises UsageError for a length that sink and newest tokens fill.
    """
    if policy.kind != "progressive":
        return policy
    heads = CacheShape.of(model)
    if length <= policy.sink + policy.window:
        raise UsageError(
            f"kv policy {policy.name}: a length of {length} tokens, and {policy.sink + policy.window} stay at 16 bits "
            "(sink and window): nothing is left to pack: use a larger --max-length"
        )
    finals = policy.widths_of(heads.layers)
    budgets = tuple(heads.bytes_at(policy, w, length) for w in finals)
    return replace(policy, finals=finals, budgets=budgets, length=length)


def attach(model: Any, policy: CachePolicy) -> None:
    """Let ``model.generate`` make a packed cache by default.

    A cache that the caller passes, or names in the generation config, is used as usual. Attention reads the packed past
    (attention.py) where the model used the library's default implementation. A second call replaces the policy. Raises as
    ``make_cache`` does.
    """
    make, name = maker(model, policy), cache_argument(model)
    if _attention(model) == "sdpa":  # else the user chose another implementation
        model.set_attn_implementation(NAME)
    detach(model)
    original = type(model)

    class Cached(original):  # type: ignore[misc, valid-type]
        """The model's own class with another method that makes the cache for ``generate``."""

        def _prepare_cache_for_generation(
            self, config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> Any:
            has_cache = model_kwargs.get(name) is not None or config.cache_implementation is not None
            if not has_cache and config.use_cache is not False:
                model_kwargs[name] = make()
            return super()._prepare_cache_for_generation(config, model_kwargs, *args, **kwargs)

    Cached.__name__, Cached.__qualname__, Cached.__module__ = (
        original.__name__,
        original.__qualname__,
        original.__module__,
    )
    Cached.plain = original
    model.__class__ = Cached


def detach(model: Any) -> None:
    """Undo ``attach``."""
    model.__class__ = getattr(type(model), "plain", type(model))
