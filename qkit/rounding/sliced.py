"""Losses of logits that are never whole: the head runs on a few tokens at a time.

Logits, their probabilities and their gradients are the largest tensors of a model with a large vocabulary: for 1024 tokens of
49,152 logits each 201 MB in float32, several times over. Every loss here is a sum over tokens, so the gradient at the head's
inputs is known once a slice of tokens has run through the head and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qkit.nn.sampling import by_sums

SLICE_LOGITS = 1 << 22  # that one worker holds at a time; fewer read the head's weights too often

Head = Callable[[Tensor], Tensor]  # hidden states [n, hidden] -> logits [n, vocabulary]


def divergence(head: Head, hidden: Tensor, original: Tensor, vocabulary: int) -> float:
    """Sum over tokens of the KL divergence from the original model, in nats.

    hidden, original: [n, hidden], what the head reads of both models
    """
    total = 0.0
    with torch.no_grad():
        for part in slices(len(hidden), vocabulary):
            true, ours = (wide(head(x[part])).log_softmax(-1) for x in (original, hidden))
            total += float((true - ours).mul_(true.exp_()).sum())
    return total


def divergence_gradient(head: Head, hidden: Tensor, original: Tensor, vocabulary: int) -> Tensor:
    """Gradient of ``divergence`` at ``hidden``."""

    def by_logits(logits: Tensor, part: slice) -> Tensor:
        return wide(logits).softmax(-1).sub_(wide(head(original[part])).softmax(-1))

    return _gradient(head, hidden, vocabulary, by_logits)


def compared(
    head: Head, hidden: Tensor, original_head: Head, original: Tensor, targets: Tensor, vocabulary: int
) -> tuple[float, float]:
    """Sums over tokens of the negative log likelihood of ``targets``, int64 [n], and of the KL divergence from the original
    model, in nats. hidden, original: [n, hidden], what the heads read"""
    likelihood, divergence_ = 0.0, 0.0
    with torch.no_grad():
        for part in slices(len(hidden), vocabulary):
            ours = wide(head(hidden[part])).log_softmax(-1)
            true = wide(original_head(original[part])).log_softmax(-1)
            likelihood -= float(ours.gather(-1, targets[part, None]).sum(dtype=torch.float64))
            divergence_ += float((true - ours).mul_(true.exp_()).sum(dtype=torch.float64))
    return likelihood, divergence_


def likelihood_gradient(head: Head, hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Gradient at ``hidden`` of the summed negative log likelihood of ``targets``, int64 [n]."""
    return _gradient(head, hidden, vocabulary, lambda logits, part: at_logits(logits, targets[part, None]))


def at_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the summed negative log likelihood at the logits. labels: int64 [n, 1]"""
    return _less_one(wide(logits).softmax(-1), labels)


def sampled_gradient(head: Head, hidden: Tensor, vocabulary: int, drawn: torch.Generator) -> Tensor:
    """Gradient at ``hidden`` of the summed negative log likelihood of labels that are drawn from the model itself."""

    def by_logits(logits: Tensor, part: slice) -> Tensor:
        chances = wide(logits).softmax(-1)
        return _less_one(chances, by_sums(chances, drawn)[:, None])

    return _gradient(head, hidden, vocabulary, by_logits)


def _less_one(chances: Tensor, labels: Tensor) -> Tensor:
    return chances.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=chances.dtype))


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they are in that."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _gradient(head: Head, hidden: Tensor, vocabulary: int, by_logits: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Gradient at ``hidden`` of a sum over tokens, from that at their logits."""
    gradient = torch.empty_like(hidden)
    for part in slices(len(hidden), vocabulary):
        with torch.enable_grad():
            leaf = hidden[part].detach().requires_grad_()
            logits = head(leaf)
        with torch.no_grad():
            at_logits = by_logits(logits.detach(), part).to(logits.dtype)
        (gradient[part],) = torch.autograd.grad(logits, leaf, at_logits)
    return gradient


def slices(tokens: int, vocabulary: int) -> Iterator[slice]:
    """The tokens whose logits are there at a time."""
    step = max(1, SLICE_LOGITS // vocabulary)
    yield from (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def slice_bytes(vocabulary: int, item: int) -> int:
    """Peak bytes that one worker holds of a slice. item: bytes of a logit as the head gives it"""
    return max(1, SLICE_LOGITS // vocabulary) * vocabulary * (4 * 4 + 3 * item)
