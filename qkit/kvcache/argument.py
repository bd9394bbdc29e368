"""The name of a model's argument for the KV cache, which transformers 5.24 renamed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def cache_argument(model: Any) -> str:
    """'cache' where the model's forward has it, else 'past_key_values'."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Arguments of the model that pass it a cache."""
    return {cache_argument(model): cache}


def is_cache(value: Any) -> bool:
    """Whether an argument of a block is a KV cache of transformers."""
    from transformers import Cache  # seconds to import: only when needed

    return isinstance(value, Cache)


def tensors_within(cache: Any) -> Iterator[Tensor]:
    """Yield the tensors that a cache holds, in its fields and the objects there."""
    seen: dict[int, Any] = {}
    open_values = [cache]
    while open_values:
        value = open_values.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            open_values += value
        elif isinstance(value, dict):
            open_values += value.values()
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
            open_values += vars(value).values()
