"""Self-speculative decoding: the model drafts with the 4-bit view of its cache and verifies with the 8-bit view.

QuantSpec (arXiv 2502.10424), greedy, with one set of weights. The newest tokens stay unquantized, so rejected
draft tokens are removed exactly. Drafts end before tokens would move to the packed part. So the result equals that of
decoding without drafts, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkit.errors import UsageError
from qkit.kvcache.argument import with_cache
from qkit.kvcache.cache import PackedCache, make_cache
from qkit.kvcache.policy import CachePolicy, parse


@dataclass(frozen=True)
class Speculated:
    """A result. tokens: int64 [1, prompt + new]; drafted, accepted: numbers of tokens; passes: of the model at 8 bits."""

    tokens: Tensor
    drafted: int
    accepted: int
    passes: int


@torch.inference_mode()
def speculate(
    model: Any, tokens: Tensor, new_tokens: int, draft: int = 4, policy: CachePolicy | None = None
) -> Speculated:  # fmt: skip
    """Prompt and greedy continuation by ``new_tokens`` tokens. tokens: the prompt, int64 [1, n].

    draft: tokens that are drafted at a time, 0 for none; policy: of the kind hierarchical. Raises UsageError for more
    than one sequence and for another kind of cache.
    """
    policy = policy or parse("hierarchical8")
    if policy.kind != "hierarchical" or len(tokens) != 1 or tokens.shape[1] < 1 or new_tokens < 1:
        raise UsageError(
            f"drafting needs a hierarchical cache, one sequence, a prompt and at least one new token; found {policy.name}, "
            f"tokens {list(tokens.shape)} and {new_tokens} new ones"
        )
    cache = make_cache(model, policy)
    pieces = [tokens.to(model.device)]
    token = _next(model, pieces[0], cache, keep=1)
    drafted = accepted = 0
    passes, new_count = 1, 1
    pieces.append(token)
    while new_count < new_tokens:
        count = max(min(draft, cache.layers[0].room - 1, new_tokens - new_count - 1), 0)
        guess = [token]
        cache.draft(True)
        for _ in range(count):
            guess.append(_next(model, guess[-1], cache)[:, -1:])
        cache.draft(False)
        if count:
            cache.crop(-count)
        draft_tokens = torch.cat(guess, dim=1)
        verified = _next(model, draft_tokens, cache)
        match_count = int((draft_tokens[:, 1:] == verified[:, :-1]).long().cumprod(1).sum())
        if count > match_count:
            cache.crop(match_count - count)
        pieces.append(verified[:, : match_count + 1])
        token = verified[:, match_count : match_count + 1]
        drafted, accepted, passes, new_count = (
            drafted + count,
            accepted + match_count,
            passes + 1,
            new_count + match_count + 1,
        )
    return Speculated(torch.cat(pieces, dim=1), drafted, accepted, passes)


def _next(model: Any, ids: Tensor, cache: PackedCache, keep: int = 0) -> Tensor:
    """The most likely next token after each token (after the last ``keep``, if given), int64 [1, n]; fills the cache."""
    logits = model(input_ids=ids, **with_cache(model, cache), use_cache=True, logits_to_keep=keep).logits
    next_tokens: Tensor = logits.argmax(-1)
    return next_tokens
