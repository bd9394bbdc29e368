"""A packed cache layer of sliding-window attention: it holds the newest tokens alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkit.errors import Unsupported
from qkit.kvcache.layer import PackedLayer
from qkit.kvcache.policy import CachePolicy
from qkit.kvcache.scales import Scale


class SlidingLayer(PackedLayer):
    """A layer whose tokens look back on ``window`` tokens, themselves included, for policies that pack every token at once."""

    is_sliding = True
    seen: int  # tokens so far

    def __init__(self, policy: CachePolicy, window: int, scales: tuple[Scale, Scale]) -> None:
        assert not (policy.sink or policy.window)
        super().__init__(policy, scales=scales)
        self.sliding_window = window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that the new ones may look at: the dequantized past, and the new ones unchanged."""
        past = self.read()
        self.append(key_states, value_states)
        self.seen += key_states.shape[2]
        assert self.body is not None
        held = self.body[0].tokens
        first = max(held - self.sliding_window + 1, 0)
        if first:
            self.body = None if first == held else (self.body[0].slice(first, held), self.body[1].slice(first, held))
        if past is None:
            return key_states, value_states
        return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = min(self.seen, self.sliding_window - 1)
        return held + query_length, self.seen - held

    def get_max_length(self) -> int:
        return self.sliding_window

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, given as a negative number. Raises Unsupported where older ones would have to come back."""
        if self.seen >= self.sliding_window and tokens_to_remove:
            raise Unsupported(
                f"a KV cache of sliding-window attention holds {self.sliding_window - 1} tokens, and those before them "
                "are gone: generate without drafts"
            )
        kept = max(self.seen + tokens_to_remove, 0)
        super().crop(tokens_to_remove)
        self.seen = kept
