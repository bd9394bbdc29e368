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

from qkit.errors import Unsupported, UsageError
from qkit.kvcache.argument import cache_argument
from qkit.kvcache.attention import NAME
from qkit.kvcache.crosslayer import cross_layers
from qkit.kvcache.layer import PackedLayer, channel_group, check_head_dim
from qkit.kvcache.policy import CachePolicy
from qkit.kvcache.scales import scales_of
from qkit.kvcache.xquant import InputLayer, sources


class PackedCache(Cache):  # type: ignore[misc]
    """A PackedLayer for every layer of a model; made by ``make_cache``. Works as any cache of transformers does."""

    def __init__(self, policy: CachePolicy, layers: list[PackedLayer]) -> None:
        super().__init__(layers=layers)
        self.policy = policy

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As of any cache. Tokens that a later layer has no room for are refused before the first one takes them."""
        if layer_idx == 0:
            for layer in self.layers:
                if layer.budget is not None:
                    layer.refuse_too_many(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache's tensors occupy, scales and all."""
        return sum(layer.nbytes for layer in self.layers)

    def draft(self, on: bool) -> None:
        """Whether a hierarchical cache is read at 4 bits."""
        for layer in self.layers:
            layer.draft = on

    @property
    def widths(self) -> list[int]:
        """Bits of the body, by layer."""
        return [layer.width for layer in self.layers]


def make_cache(model: Any, policy: CachePolicy) -> PackedCache:
    """An empty cache for a model (or its config). Raises Unsupported for attention that it cannot serve, UsageError for a
    policy that does not suit the model."""
    return maker(model, policy)()


def maker(model: Any, policy: CachePolicy) -> Callable[[], PackedCache]:
    """What makes empty caches for a model, with all that is checked and computed but once. Raises as ``make_cache``."""
    heads = Heads.of(model)
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
            return lambda: PackedCache(policy, [])  # what can be said of a config alone was said
        if policy.kind == "xquant-cl":
            shared = sources(model, heads.head_dim, shared=True)
            return lambda: PackedCache(policy, cross_layers(policy, shared))
        made = sources(model, heads.head_dim)
        return lambda: PackedCache(policy, [InputLayer(policy, s) for s in made])
    budgets = policy.budgets or (None,) * heads.layers
    scales = [(1.0, 1.0)] * heads.layers
    if policy.kind == "fp" and isinstance(model, nn.Module):
        scales = scales_of(model, heads.layers)
    layers = list(zip(budgets, scales, strict=True))
    return lambda: PackedCache(policy, [PackedLayer(policy, b, _attention(model) == NAME, s) for b, s in layers])


def _attention(model: Any) -> str | None:
    """The attention that a model runs with; None for a config alone."""
    if not isinstance(model, nn.Module):
        return None
    config: Any = model.config
    return getattr(config.get_text_config(decoder=True), "_attn_implementation", None)


class Heads:
    """layers, and of each: heads of keys and their channels; hidden: numbers of a token between layers."""

    def __init__(self, layers: int, heads: int, head_dim: int, hidden: int = 0) -> None:
        self.layers, self.heads, self.head_dim, self.hidden = layers, heads, head_dim, hidden

    @staticmethod
    def of(model: Any) -> Heads:
        """Of a model or config. Raises Unsupported where keys and values are not kept whole for every token."""
        config: Any = model.config if isinstance(model, nn.Module) else model
        config = config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        found = sorted(kinds - {"full_attention"}) or (["sliding_attention"] if window and not kinds else [])
        found += ["multi-head latent attention"] if getattr(config, "kv_lora_rank", None) else []
        if found:
            raise Unsupported(
                f"a quantized KV cache for {config.model_type}: its layers have {', '.join(found)}, and only full attention "
                "with keys and values per head is supported: leave --kv out"
            )
        heads = config.num_attention_heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Heads(config.num_hidden_layers, kept, head_dim, config.hidden_size)

    def bytes_at(self, policy: CachePolicy, width: int, tokens: int) -> int:
        """The most bytes that a layer occupies on the way to so many tokens of one sequence, at that final width. Raises
        UsageError for heads that cannot be packed."""
        check_head_dim(self.head_dim, policy)
        kept = self.heads * self.head_dim
        values = (kept, channel_group(self.head_dim, policy.group))
        sides = [(kept, policy.group) if policy.kind in ("kivi", "hierarchical") else values, values]
        if policy.kind == "xquant-cl" or (policy.kind == "xquant" and self.hidden <= kept):
            half = min(self.hidden // 2, kept)
            sides = [(half, channel_group(half, policy.group))] * 2
        elif policy.kind == "xquant":
            sides = [(kept, policy.group), (kept, channel_group(kept, policy.group))]
        scaled = policy.kind == "progressive"  # tokens of 16 bits are codes too
        whole = sum(2 * n + (4 * n // g if scaled else 0) for n, g in sides)
        narrow = sum(n * width // 8 + (4 * n // g if policy.kind != "fp" else 0) for n, g in sides)

        def at(n: int) -> int:
            sink = min(n, policy.sink)
            old = max(n - sink - policy.keep, 0)
            body = old // policy.window * policy.window if policy.window else old
            return (n - body) * whole + body * narrow

        # The newest tokens are most just before a group of them moves on.
        first = policy.sink + policy.keep
        before = first + max((tokens - first + 1) // max(policy.window, 1) * policy.window - 1, 0)
        return max(at(tokens), at(min(before, tokens)))


def with_budgets(policy: CachePolicy, model: Any, length: int) -> CachePolicy:
    """The policy with a budget for every layer: what it takes to hold ``length`` tokens of a sequence at the layer's final
    width (policy.finals; without them the least of policy.widths). Other kinds come back as they are.

    Raises UsageError for a length that the sink and the newest tokens fill.
    """
    if policy.kind != "progressive":
        return policy
    heads = Heads.of(model)
    if length <= policy.sink + policy.window:
        raise UsageError(
            f"kv policy {policy.name}: a length of {length} tokens, and {policy.sink + policy.window} stay at 16 bits "
            "(sink and window): nothing is left to pack: use a larger --max-length"
        )
    finals = policy.widths_of(heads.layers)
    budgets = tuple(heads.bytes_at(policy, w, length) for w in finals)
    return replace(policy, finals=finals, budgets=budgets, length=length)


def attach(model: Any, policy: CachePolicy) -> None:
    """From now on ``model.generate`` makes a packed cache where it would make a plain one; a cache that the caller gives,
    and one that is asked for by name, stay what they are. Attention reads the past packed (attention.py) where the
    model ran the library's default. Attached again, the last policy counts.

    Raises what ``make_cache`` raises.
    """
    make, name = maker(model, policy), cache_argument(model)
    if _attention(model) == "sdpa":  # another was asked for by name
        model.set_attn_implementation(NAME)
    detach(model)
    original = type(model)

    class Cached(original):  # type: ignore[misc, valid-type]
        """The model's own class; ``generate`` asks it for a cache."""

        def _prepare_cache_for_generation(self, config: Any, given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            asked = given.get(name) is not None or config.cache_implementation is not None
            if not asked and config.use_cache is not False:
                given[name] = make()
            return super()._prepare_cache_for_generation(config, given, *args, **kwargs)

    Cached.__name__, Cached.__qualname__, Cached.__module__ = (
        original.__name__,
        original.__qualname__,
        original.__module__,
    )
    Cached.plain = original
    model.__class__ = Cached


def detach(model: Any) -> None:
    """Takes ``attach`` back."""
    model.__class__ = getattr(type(model), "plain", type(model))
