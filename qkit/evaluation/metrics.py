"""The metrics of quantization: perplexity, divergence from the original, error of a tensor.

The text metric of this project: a text is tokenised whole (no special tokens added) and cut into consecutive windows
that do not overlap; positions 2 to ``window`` of each are scored. A window is the unit of every interval here, because
tokens of one window depend on each other: resampling single tokens would make the intervals much too narrow.

Memory: logits of one small batch (of both models, when two are compared) and fp32 temporaries of a chunk of its
positions; nothing grows with the text but a few numbers per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qkit.errors import BadInput, UsageError
from qkit.system.progress import Advance

BATCH = 8  # most windows per forward pass
BATCH_BYTES = 512 << 20  # of fp32 logits of a batch; one window is the least
CHUNK_BYTES = 64 << 20  # of one fp32 temporary over a chunk of positions
RESAMPLES = 10_000
Z95 = 1.959963984540054  # half width of a 95 % interval, in standard errors


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval; ``low`` and ``high`` are NaN when one unit gives no spread."""

    mean: float
    low: float
    high: float

    @property
    def ends(self) -> list[float]:
        """The interval as [low, high]."""
        return [self.low, self.high]

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of a growing function of the mean."""
        return Interval(function(self.mean), function(self.low), function(self.high))


@dataclass(frozen=True)
class Comparison:
    """Two models on the same windows; every tensor is [windows, window - 1], a value per scored token.

    reference, approx: negative log likelihood in nats, float64
    kl:                KL(reference || approx) over the whole vocabulary, in nats, float64
    same_top1:         both models put the same token first, bool
    reference_right, approx_right: the model puts the token first that comes next in the text, bool
    """

    reference: Tensor
    approx: Tensor
    kl: Tensor
    same_top1: Tensor
    reference_right: Tensor
    approx_right: Tensor

    def part(self, at: slice) -> Comparison:
        """The same of some positions of every window."""
        return Comparison(*(getattr(self, f.name)[:, at] for f in fields(self)))


def nll_windows(
    model: Any, tokens: Tensor, window: int, limit: int | None = None, progress: Advance | None = None
) -> Tensor:
    """Negative log likelihood, in nats, of positions 2..window of each window.

    tokens: int64 [n]; the result is float64 [windows, window - 1] on the CPU. ``model(input_ids=..., use_cache=False)``
    must return an object with ``logits`` [batch, window, vocabulary]. The log-softmax is fp32 for any dtype of model.
    Raises BadInput when the text is shorter than one window or has tokens outside the vocabulary, UsageError for a
    window that the model cannot take.
    """
    windows = split_windows(tokens, window, limit)
    parts = []
    for ids in _batches([model], windows, progress):
        logits = _logits(model, ids)
        rows = [_nll(_log_softmax(logits, at), ids[:, 1:], at) for at in _chunks(logits[:, :-1])]
        parts.append(torch.cat(rows, dim=1).cpu())
    return torch.cat(parts)


def compare_windows(
    reference: Any, approx: Any, tokens: Tensor, window: int, limit: int | None = None, progress: Advance | None = None
) -> Comparison:
    """The comparison of both models over the same windows: likelihoods, KL(reference || approx) and same top-1 per token.

    Arguments and errors as for ``nll_windows``; further a UsageError when the vocabularies differ in size.
    """
    return compare_all(reference, [approx], tokens, window, limit, progress)[0]


def compare_all(
    reference: Any,
    models: Sequence[Any],
    tokens: Tensor,
    window: int,
    limit: int | None = None,
    progress: Advance | None = None,
) -> list[Comparison]:
    """The comparisons of several models with one reference, which runs once (``compare_windows``)."""
    windows = split_windows(tokens, window, limit)
    parts: list[list[Comparison]] = [[] for _ in models]
    for ids in _batches([reference, *models], windows, progress):
        p_logits = _logits(reference, ids)
        for model_parts, approx in zip(parts, models, strict=True):
            model_parts.append(compare_logits(p_logits[:, :-1], _logits(approx, ids)[:, :-1], ids[:, 1:]))
    return [joined(model_parts, 0) for model_parts in parts]


def joined(parts: Sequence[Comparison], dim: int) -> Comparison:
    """Comparisons of other windows (dim 0) or of what follows in the same ones (dim 1) as one."""
    columns = zip(*([getattr(part, f.name) for f in fields(Comparison)] for part in parts), strict=True)
    return Comparison(*(torch.cat(column, dim=dim) for column in columns))


def compare_logits(p_logits: Tensor, q_logits: Tensor, targets: Tensor) -> Comparison:
    """The comparison of the logits [windows, n, vocabulary] of the reference and of another model, and the tokens [windows, n]
    that come next."""
    if p_logits.shape != q_logits.shape:
        raise UsageError(
            f"the two models cannot be compared token by token: the reference has a vocabulary of "
            f"{p_logits.shape[-1]}, the other one of {q_logits.shape[-1]}; use the model that it was made from"
        )
    rows = []
    for at in _chunks(p_logits):
        p, q = _log_softmax(p_logits, at), _log_softmax(q_logits, at).to(p_logits.device)
        kl = divergence(p, q)
        firsts = p.argmax(-1), q.argmax(-1)
        same_top1 = (firsts[0] == firsts[1]) & ~kl.isnan()
        next_tokens = targets[:, at].to(p.device)
        right = [first == next_tokens for first in firsts]
        row = [_nll(p, targets, at), _nll(q, targets, at), kl, same_top1, *right]
        rows.append(Comparison(*(column.cpu() for column in row)))
    return joined(rows, 1)


def split_windows(tokens: Tensor, window: int, limit: int | None = None) -> Tensor:
    """The consecutive windows of a text, int64 [n] -> [windows, window], the first ``limit``; a shorter rest is left out."""
    if window < 2 or (limit is not None and limit < 1):
        raise UsageError(f"a window needs at least 2 tokens and a limit at least 1 window; found {window} and {limit}")
    count = tokens.numel() // window
    if count == 0:
        raise BadInput(
            f"the text has {tokens.numel()} tokens, and one window needs {window}: use more text, or shorter windows"
        )
    count = count if limit is None else min(count, limit)
    return tokens.reshape(-1)[: count * window].reshape(count, window)


def _batches(models: list[Any], windows: Tensor, progress: Advance | None) -> Iterator[Tensor]:
    vocabulary = 0
    for model in models:
        vocabulary = max(vocabulary, getattr(_text_config(model), "vocab_size", 0))
        check_window(model, windows.shape[1])
    size = max(1, min(BATCH, BATCH_BYTES // (4 * windows.shape[1] * max(vocabulary, 1))))
    for start in range(0, len(windows), size):
        yield windows[start : start + size]
        if progress is not None:
            progress(min(start + size, len(windows)), len(windows))


def check_window(model: Any, window: int) -> None:
    """Raises UsageError for windows that are longer than the model's positions."""
    longest = longest_window(model)
    if longest is not None and window > longest:
        raise UsageError(f"windows of {window} tokens do not fit the model, whose max_position_embeddings is {longest}")


def longest_window(model: Any) -> int | None:
    """The positions of a model; None where it names no limit."""
    longest: int | None = getattr(_text_config(model), "max_position_embeddings", None)
    return longest


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    device = next(chain(model.parameters(), model.buffers())).device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    if int(ids.max()) >= logits.shape[-1] or int(ids.min()) < 0:
        raise BadInput(
            f"the text has token {int(ids.max())} and the model a vocabulary of {logits.shape[-1]}; "
            "use the tokenizer that belongs to the model"
        )
    return logits


def _chunks(logits: Tensor) -> Iterator[slice]:
    batch, count, vocabulary = logits.shape
    step = max(1, CHUNK_BYTES // (4 * batch * vocabulary))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _log_softmax(logits: Tensor, at: slice) -> Tensor:
    return torch.log_softmax(logits[:, at].float(), dim=-1)


def _nll(log_probabilities: Tensor, targets: Tensor, at: slice) -> Tensor:
    next_tokens = targets[:, at].to(log_probabilities.device)
    return -log_probabilities.gather(-1, next_tokens[..., None])[..., 0].double()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The KL divergence KL(p || q) in nats, float64 [...]: the sum over the vocabulary of p (log p - log q), from log
    probabilities [..., vocabulary]; a token that p excludes adds nothing."""
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1, dtype=torch.float64).clamp_(min=0.0)  # rounding can leave it a little below zero


def bootstrap_ci(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of ``values`` [n], one per independent unit, with the percentile bootstrap interval (Efron 1979).

    The same values and seed give the same interval. Neighbouring windows of one text are not quite independent, so the
    interval of a short text is a little too narrow.
    """
    values = values.detach().double().reshape(-1).cpu()
    if values.numel() == 0:
        raise BadInput("there is nothing to average: no values were measured")
    mean = float(values.mean())
    if values.numel() == 1 or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)
    step = max(1, (8 << 20) // values.numel())
    means = []
    for start in range(0, resamples, step):
        picks = torch.randint(
            values.numel(), (min(step, resamples - start), values.numel()), generator=generator, dtype=torch.int64
        )
        means.append(values[picks].mean(1))
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


def wilson_ci(right: Tensor) -> Interval:
    """The share of true values in bool [n], with Wilson's interval (1927), which has a width where all or none are true."""
    n, share = right.numel(), float(right.double().mean())
    spread = Z95 * math.sqrt(share * (1 - share) / n + (Z95 / (2 * n)) ** 2)
    middle, scale = share + Z95**2 / (2 * n), 1 + Z95**2 / n
    return Interval(share, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))


def ratio_ci(sums: Tensor, counts: Tensor) -> Interval:
    """The mean over tokens, ``sums`` [n] over ``counts`` [n] with one of each per unit, and its interval over units.

    The bootstrap is of the ratio made linear: units of many tokens weigh more, and the mean is the ratio itself.
    """
    sums, counts = sums.double(), counts.double()
    ratio = sums.sum() / counts.sum()
    if not bool(ratio.isfinite()):
        return Interval(float(ratio), math.nan, math.nan)
    return bootstrap_ci(ratio + (sums - ratio * counts) / counts.mean())


def quantile(values: Tensor, q: float) -> float:
    """The nearest-rank quantile: a value that occurred (and no limit on the number of values); NaN if any is."""
    flat = values.flatten()
    if bool(flat.isnan().any()):
        return math.nan
    rank = max(1, math.ceil(q * flat.numel()))
    return float(flat.kthvalue(rank).values)


def perplexity(nll: Tensor) -> Interval:
    """The perplexity exp(mean of nll) with its interval over windows; ``nll`` is [windows, tokens] in nats."""
    return bootstrap_ci(nll.mean(1)).map(exp)


def perplexity_change(reference: Tensor, approx: Tensor) -> Interval:
    """The relative change of perplexity, 0.02 for +2 %, paired: the windows that are hard for one are hard for the other.

    Both are nll [windows, tokens] of the same windows. The interval of the difference is far narrower than what the
    two intervals on their own suggest.
    """
    return bootstrap_ci(approx.mean(1) - reference.mean(1)).map(lambda difference: exp(difference) - 1.0)


def exp(value: float) -> float:
    """The exponential function, with infinity where that is beyond a float."""
    return math.inf if value > 709.0 else math.exp(value)


def sqnr_db(reference: Tensor, approx: Tensor) -> float:
    """The signal to quantization noise in decibels: 10 log10(sum ref^2 / sum (ref - approx)^2); inf when they are equal."""
    signal, noise = _energies(reference, approx)
    if noise == 0.0:
        return math.inf
    if signal == 0.0 or noise == math.inf:
        return -math.inf
    return 10.0 * math.log10(signal / noise)


def relative_error(reference: Tensor, approx: Tensor) -> float:
    """The norm of the difference over the norm of the reference (Frobenius); 0 when they are equal."""
    signal, noise = _energies(reference, approx)
    if noise == 0.0:
        return 0.0
    return math.inf if signal == 0.0 else math.sqrt(noise / signal)


def cosine(reference: Tensor, approx: Tensor) -> float:
    """The cosine of the angle between the two tensors as vectors; two zero tensors agree: 1."""
    a, b = reference.double().flatten(), approx.double().flatten()
    norms = float(a.norm()) * float(b.norm())
    if norms == 0.0:
        return 1.0 if float(a.norm()) == float(b.norm()) else 0.0
    return float(a @ b) / norms


def _energies(reference: Tensor, approx: Tensor) -> tuple[float, float]:
    if reference.shape != approx.shape:
        raise UsageError(f"cannot compare shapes {tuple(reference.shape)} and {tuple(approx.shape)}")
    a = reference.double()
    return float(a.square().sum()), float((a - approx.double()).square().sum())
