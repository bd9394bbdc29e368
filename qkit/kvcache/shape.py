"""The sizes of a model's KV cache, as far as its config tells."""

from __future__ import annotations

from typing import Any

from torch import nn

from qkit.errors import Unsupported
from qkit.kvcache.float4 import GROUP as NVFP4_GROUP
from qkit.kvcache.grouping import channel_group, check_head_dim
from qkit.kvcache.policy import STATIC, CachePolicy

_WINDOWED = ("sliding_attention", "chunked_attention")  # transformers keeps the newest tokens of both
_SHARED = "keys and values that layers share"


class CacheShape:
    """Sizes of a model's KV cache: layers; heads of keys and their channels in each; hidden size; windows: by layer, the tokens
    that it looks back on, None for all (empty: all layers look at all)."""

    def __init__(
        self, layers: int, heads: int, head_dim: int, hidden: int = 0, windows: tuple[int | None, ...] = ()
    ) -> None:
        self.layers, self.heads, self.head_dim, self.hidden = layers, heads, head_dim, hidden
        self.windows = windows or (None,) * layers

    @staticmethod
    def of(model: Any, windows: bool = False) -> CacheShape:
        """The sizes for a model or config. windows: whether layers may keep the newest tokens alone.

        Raises Unsupported for attention that does not keep keys and values of tokens.
        """
        config: Any = model.config if isinstance(model, nn.Module) else model
        config = config.get_text_config(decoder=True)
        if not (hasattr(config, "num_hidden_layers") and hasattr(config, "num_attention_heads")):
            raise Unsupported(
                f"a quantized KV cache for {config.model_type}: its config names no layers and heads: leave --kv out"
            )
        kinds, limits = _layers_of(config)
        allowed = {"full_attention", *(_WINDOWED if windows else ())}
        unsupported = sorted({*kinds} - allowed)
        unsupported += ["multi-head latent attention"] if getattr(config, "kv_lora_rank", None) else []
        if unsupported:
            raise Unsupported(
                f"a quantized KV cache for {config.model_type}: its layers have {', '.join(unsupported)}, and only "
                f"{'full and sliding' if windows else 'full'} attention with keys and values per head is supported: "
                "leave --kv out"
            )
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return CacheShape(config.num_hidden_layers, key_heads, head_dim, config.hidden_size, limits)

    def tokens_of(self, length: int) -> list[int]:
        """The tokens that each layer holds of a sequence."""
        return [length if window is None else min(length, window) for window in self.windows]

    def bytes_at(self, policy: CachePolicy, width: int, tokens: int) -> int:
        """Peak bytes of a layer while one sequence grows to ``tokens`` tokens, at a final width.

        Raises UsageError for heads that cannot be packed.
        """
        check_head_dim(self.head_dim, policy)
        numbers = self.heads * self.head_dim
        values = (numbers, channel_group(self.head_dim, policy.group))
        sides = [(numbers, policy.group) if policy.kind in ("kivi", "hierarchical") else values, values]
        if policy.kind == "xquant-cl" or (policy.kind == "xquant" and self.hidden <= numbers):
            half = min(self.hidden // 2, numbers)
            sides = [(half, channel_group(half, policy.group))] * 2
        elif policy.kind == "xquant":
            sides = [(numbers, policy.group), (numbers, channel_group(numbers, policy.group))]
        scaled = policy.kind == "progressive"  # tokens of 16 bits are codes too
        wide_bytes = sum(2 * n + (4 * n // g if scaled else 0) for n, g in sides)
        scale_bytes = sum(_scale_bytes(policy.kind, n, g) for n, g in sides)
        narrow_bytes = sum(n * width // 8 for n, _ in sides) + scale_bytes

        def at(n: int) -> int:
            sink = min(n, policy.sink)
            old = max(n - sink - policy.keep, 0)
            body = old // policy.window * policy.window if policy.window else old
            return (n - body) * wide_bytes + body * narrow_bytes

        # There are most recent tokens just before a group of them moves to the body.
        first_packed = policy.sink + policy.keep
        fullest = first_packed + max((tokens - first_packed + 1) // max(policy.window, 1) * policy.window - 1, 0)
        return max(at(tokens), at(min(fullest, tokens)))


def _layers_of(config: Any) -> tuple[list[str], tuple[int | None, ...]]:
    """The kind of attention of each layer, and how many tokens it looks back on."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, settings = get_layer_types_and_kwargs(config)
    if getattr(config, "num_kv_shared_layers", 0):
        kinds = [*kinds, _SHARED]
    if not getattr(config, "use_sliding_window", True):
        return ["full_attention" if x == "sliding_attention" else x for x in kinds], (None,) * len(settings)
    return [_SHARED if x == "dummy" else x for x in kinds], tuple(s.get("sliding_window") for s in settings)


def _scale_bytes(kind: str, numbers: int, group: int) -> int:
    """Bytes of the scales of one token's keys or values that the cache itself holds."""
    if kind == "nvfp":
        return numbers // NVFP4_GROUP
    return 0 if kind in STATIC else 4 * numbers // group
