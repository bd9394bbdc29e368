"""The cost of a quantized KV cache: perplexity by decoding, through the cache, and the bytes of the cache.

A forward pass over a whole text never reads keys and values back from the cache, so it says nothing about it. Here the
first part of a window is the prompt and the rest is fed a step at a time: every likelihood is of a token whose past was
read from the cache. The same windows go through a plain cache, so that differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkit.errors import UsageError
from qkit.evaluation.metrics import check_window, perplexity, perplexity_change, split_windows
from qkit.kvcache.argument import with_cache
from qkit.kvcache.cache import PackedCache, make_cache, with_budgets
from qkit.kvcache.policy import CachePolicy
from qkit.kvcache.shape import CacheShape
from qkit.kvcache.store import Plain

BATCH = 8  # windows that are decoded together
GREEDY = 32  # tokens of a greedy continuation; our choice


@dataclass(frozen=True)
class DecodingResult:
    """The likelihoods of decoded windows, and the size of their cache.

    nll: float64 [windows, window - prompt], in nats, of the tokens after the prompt; bytes: of the cache in the end, of
    one sequence; plain_bytes: of keys and values as they come; widths: bits of each layer's body in the end; halvings:
    [(tokens, layer, bits)] of the first batch, every change of a width.
    """

    nll: Tensor
    bytes: float
    plain_bytes: float
    widths: tuple[int, ...]
    halvings: tuple[tuple[int, int, int], ...]


@torch.inference_mode()
def decode_windows(
    model: Any, windows: Tensor, prompt: int, policy: CachePolicy | None, step: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> DecodingResult:  # fmt: skip
    """The likelihoods of windows that are decoded through a cache. Each window [windows, length] goes through it (None: a
    plain one): ``prompt`` tokens at once, then ``step`` at a time. A progressive policy without budgets gets those of
    windows of this length; budgets are of one sequence."""
    count, length = windows.shape
    _check_prompt(prompt, length)
    parts, halvings, cache = [], [], None
    for at in range(0, count, BATCH):
        ids = windows[at : at + BATCH].to(model.device)
        cache = fresh_cache(model, policy, length)
        pieces = [ids[:, :prompt], *(ids[:, i : min(i + step, length - 1)] for i in range(prompt, length - 1, step))]
        before: list[int] = []
        for i, piece in enumerate(pieces):
            keep = 1 if i == 0 else piece.shape[1]  # of the prompt only the last token's are of use
            logits = model(input_ids=piece, **with_cache(model, cache), use_cache=True, logits_to_keep=keep).logits
            parts.append(_nll(logits, ids, cache.get_seq_length()))
            if at == 0 and isinstance(cache, PackedCache):
                widths_now = cache.widths
                changed = [
                    (cache.get_seq_length(), n, w) for n, w in enumerate(widths_now) if not before or w != before[n]
                ]
                halvings += changed
                before = widths_now
        if progress is not None:
            progress(min(at + BATCH, count), count)
    per_batch = len(pieces)
    rows = [torch.cat(parts[i : i + per_batch], dim=1) for i in range(0, len(parts), per_batch)]
    size, plain_bytes = sizes(model, cache, len(ids))
    widths = cache.widths if isinstance(cache, PackedCache) else []
    return DecodingResult(torch.cat(rows).cpu(), size, plain_bytes, tuple(widths), tuple(halvings))


@torch.inference_mode()
def greedy_tokens(model: Any, windows: Tensor, prompt: int, policy: CachePolicy | None, count: int) -> Tensor:
    """The most likely continuation of each window's first ``prompt`` tokens through such a cache, int64 [windows, count]."""
    rows = []
    for ids in windows[:, :prompt].split(BATCH):
        cache = fresh_cache(model, policy, windows.shape[1])
        token, tokens = ids.to(model.device), []
        for _ in range(count):
            logits = model(input_ids=token, **with_cache(model, cache), use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)
            tokens.append(token)
        rows.append(torch.cat(tokens, dim=1))
    return torch.cat(rows).cpu()


def fresh_cache(model: Any, policy: CachePolicy | None, length: int) -> Any:
    """An empty cache, a plain one for None. A progressive policy without budgets gets those of ``length`` tokens."""
    from transformers import DynamicCache

    if policy is None:
        return DynamicCache(config=model.config)
    return make_cache(model, policy if policy.budgets else with_budgets(policy, model, length))


def sizes(model: Any, cache: Any, sequences: int) -> tuple[float, float]:
    """Bytes of a sequence in a cache that holds so many, and those of a plain one at 16 bits; tokens that are kept as they
    came count as 16 bits, whatever the arithmetic here."""
    heads = CacheShape.of(model, windows=True)
    plain_bytes = 2.0 * heads.heads * heads.head_dim * sum(heads.tokens_of(cache.get_seq_length())) * 2
    if not isinstance(cache, PackedCache):
        return plain_bytes, plain_bytes
    segments = [s for layer in cache.layers for pair in layer.segments for s in pair]
    wide_bytes = sum(s.data.nbytes - 2 * s.data.numel() for s in segments if type(s) is Plain)
    return (cache.nbytes - wide_bytes) / sequences, plain_bytes


def _check_prompt(prompt: int, length: int) -> None:
    if not 1 <= prompt < length:
        raise UsageError(
            f"a prompt of {prompt} tokens in windows of {length}: expected at least 1 and fewer than the window"
        )


def _nll(logits: Tensor, ids: Tensor, filled: int) -> Tensor:
    """float64 [batch, n]: of the tokens that follow those which gave the logits [batch, n, vocabulary]."""
    n = logits.shape[1]
    targets = ids[:, filled - n + 1 : filled + 1]
    logits = logits[:, : targets.shape[1]].to(torch.float32)
    nll: Tensor = -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0].to(torch.float64)
    return nll


def evaluate_caches(
    model: Any, tokens: Tensor, window: int, limit: int | None, prompt: int, policies: Mapping[str, CachePolicy],
    step: int = 1, progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The figures of a text for each policy, {name: figures}; the plain cache comes first, under 'none'.

    Figures: perplexity and ci (95 %, over windows), first_half (perplexity of the first half of what is decoded),
    change_percent and change_ci (of the perplexity, against the plain cache, paired), same_greedy (of GREEDY tokens
    of a greedy continuation, those before the first that is not the plain cache's; mean over windows), bytes (of a
    sequence in the end),
    share (of 16 bits), widths, halvings. Raises UsageError for a window or a prompt that cannot be, what ``make_cache``
    raises for a policy that does not suit the model.
    """
    check_window(model, window)
    _check_prompt(prompt, window)
    windows = split_windows(tokens, window, limit)
    figures: dict[str, dict[str, Any]] = {}
    plain_nll: Tensor | None = None
    plain_greedy = torch.zeros(0)
    for name, policy in [("none", None), *policies.items()]:
        greedy = greedy_tokens(model, windows, prompt, policy, min(GREEDY, window - prompt))
        report = None if progress is None else (lambda done, total, name=name: progress(name, done, total))
        decoded = decode_windows(model, windows, prompt, policy, step, report)
        overall = perplexity(decoded.nll)
        half = decoded.nll[:, : decoded.nll.shape[1] // 2]
        figures[name] = {
            "perplexity": overall.mean,
            "ci": overall.ends,
            "first_half": math.exp(float(half.mean())) if half.numel() else math.nan,
            "same_greedy": float(
                (greedy == (greedy if plain_nll is None else plain_greedy)).long().cumprod(1).sum(1).double().mean()
            ),
            "bytes": decoded.bytes,
            "share": decoded.bytes / decoded.plain_bytes,
            "widths": list(decoded.widths),
            "halvings": [list(h) for h in decoded.halvings],
        }
        if plain_nll is None:
            plain_nll, plain_greedy = decoded.nll, greedy
        else:
            change = perplexity_change(plain_nll, decoded.nll).map(lambda share: 100 * share)
            figures[name] |= {"change_percent": change.mean, "change_ci": change.ends}
    return figures
