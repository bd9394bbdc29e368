"""The name of a model's argument for the KV cache, which transformers 5.24 renamed."""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """'cache' where the model's forward has it, else 'past_key_values'."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Arguments of the model that pass it a cache."""
    return {cache_argument(model): cache}
