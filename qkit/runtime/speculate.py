"""Self-speculative decoding: the model drafts with the 4-bit view of its own cache and checks with the 8-bit one.

QuantSpec (arXiv 2502.10424), greedy, with one set of weights. Newest tokens are kept as they came, so that what was
drafted and is not accepted is taken back without a trace; drafts end where tokens would move on to the packed part,
so that the result is token by token that of decoding without drafts.
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
    """tokens: int64 [1, prompt + new]; drafted and accepted: how many tokens; passes: of the model at full view."""

    tokens: Tensor
    drafted: int
    accepted: int
    passes: int


@torch.inference_mode()
def speculate(
    model: Any, tokens: Tensor, new_tokens: int, draft: int = 4, policy: CachePolicy | None = None
) -> Speculated:  # fmt: skip
    """Continue a prompt, int64 [1, n], greedily by ``new_tokens``.

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
    found = [tokens.to(model.device)]
    token = _next(model, found[0], cache, keep=1)
    drafted = accepted = 0
    passes, made = 1, 1
    found.append(token)
    while made < new_tokens:
        count = max(min(draft, cache.layers[0].room - 1, new_tokens - made - 1), 0)
        guess = [token]
        cache.draft(True)
        for _ in range(count):
            guess.append(_next(model, guess[-1], cache)[:, -1:])
        cache.draft(False)
        if count:
            cache.crop(-count)
        fed = torch.cat(guess, dim=1)
        true = _next(model, fed, cache)
        same = int((fed[:, 1:] == true[:, :-1]).long().cumprod(1).sum())
        if count > same:
            cache.crop(same - count)
        found.append(true[:, : same + 1])
        token = true[:, same : same + 1]
        drafted, accepted, passes, made = drafted + count, accepted + same, passes + 1, made + same + 1
    return Speculated(torch.cat(found, dim=1), drafted, accepted, passes)


def _next(model: Any, ids: Tensor, cache: PackedCache, keep: int = 0) -> Tensor:
    """int64 [1, n]: the most likely token after each of them (of the last ``keep``, if given); they go into the cache."""
    logits = model(input_ids=ids, **with_cache(model, cache), use_cache=True, logits_to_keep=keep).logits
    picked: Tensor = logits.argmax(-1)
    return picked
