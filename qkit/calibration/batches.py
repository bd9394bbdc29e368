"""Calibration rows as passes through a model: what it is called with, and which tokens the loss is of.

Rows of a text go through the model several at a time and every token after the first is scored. Rows with pictures go one at a
time, and scored are the tokens of the answers alone, all of them alike: what training with pictures takes the loss of (MBQ,
arXiv 2412.19509, weighs by gradients of the same loss).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkit.calibration.dataset import ANSWER, VISION, Calibration

CHUNK_TOKENS = 1024  # of a forward or backward pass of one worker
Rows = Tensor | Calibration  # int64 [rows, length] of a text, or rows of a text or with pictures


@dataclass(frozen=True)
class Batch:
    """inputs: what the model is called with; at: int64 [n], of a row with pictures, the places before the tokens of its answer;
    None: rows of a text, where every token after the first is scored."""

    inputs: dict[str, Tensor]
    at: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """int64 [rows, length]"""
        return self.inputs["input_ids"]

    @property
    def targets(self) -> Tensor:
        """The scored tokens, int64 [rows, scored]."""
        return self.ids[:, 1:] if self.at is None else self.ids[:, self.at + 1]

    @property
    def options(self) -> dict[str, Tensor]:
        """What a model with its head is called with beside ``inputs``: with pictures it gives the logits of ``at`` alone."""
        return {} if self.at is None else {"logits_to_keep": self.at}

    def scored(self, logits: Tensor) -> Tensor:
        """Of the logits that a model gives, those of the scored tokens, [rows, scored, vocabulary]."""
        return logits[:, :-1] if self.at is None else logits

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        at = None if self.at is None else self.at.to(device)
        return Batch({k: v.to(device) for k, v in self.inputs.items()}, at)

    def cloned(self) -> Batch:
        """The same in tensors that autograd takes, where the original ones were made in inference mode."""
        return Batch({k: v.clone() for k, v in self.inputs.items()}, None if self.at is None else self.at.clone())


def batches(rows: Rows, most: int = CHUNK_TOKENS) -> tuple[Batch, ...]:
    """Rows in pieces that one worker takes at a time, of a text up to ``most`` tokens; they do not depend on the workers."""
    if isinstance(rows, Tensor):
        return tuple(Batch({"input_ids": piece}) for piece in rows.split(max(1, most // rows.shape[1])))
    if rows.inputs is None or rows.kinds is None:
        return batches(rows.tokens, most)
    answers = [(k == ANSWER).nonzero()[:, 0] for k in rows.kinds]
    return tuple(Batch(dict(x), at - 1) for x, at in zip(rows.inputs, answers, strict=True))


@dataclass(frozen=True)
class Extent:
    """How much all rows are. length: of the longest; scored: tokens that the loss is of; chunk: the most tokens that one worker
    takes at a time."""

    rows: int
    length: int
    scored: int
    chunk: int


def text_extent(rows: int, length: int) -> Extent:
    """Of so many rows of a text."""
    return Extent(rows, length, rows * (length - 1), length * min(rows, max(1, CHUNK_TOKENS // length)))


def extent(rows: Calibration) -> Extent:
    """Of these rows."""
    if rows.kinds is None:
        return text_extent(rows.samples, rows.seqlen)
    return Extent(rows.samples, rows.seqlen, int((rows.kinds == ANSWER).sum()), rows.seqlen)


@dataclass(frozen=True)
class Sample:
    """Some tokens of all rows. places: int64 [n], counted over the tokens of all rows one after the other, rising.

    kinds: uint8 [n], and stands_for: float32 [n], how many tokens of its kind each stands for; None: of a text
    """

    places: Tensor
    kinds: Tensor | None = None
    sample_weight: Tensor | None = None


def sample(rows: Rows, count: int) -> Sample:
    """At most ``count`` tokens that are spread evenly over all rows.

    Of rows with pictures only tokens of pictures and of answers, as many of the one as of the other where there are so many.
    """
    if isinstance(rows, Tensor) or rows.inputs is None or rows.kinds is None:
        return Sample(_spread((rows if isinstance(rows, Tensor) else rows.tokens).numel(), count))
    kinds = torch.cat([k[: x["input_ids"].shape[1]] for k, x in zip(rows.kinds, rows.inputs, strict=True)])
    found = [p for p in ((kinds == k).nonzero()[:, 0] for k in (VISION, ANSWER)) if len(p)]
    chosen = [p[_spread(len(p), count // len(found))] for p in found]
    weights = [torch.full((len(c),), len(p) / len(c)) for p, c in zip(found, chosen, strict=True)]
    places, order = torch.cat(chosen).sort()
    return Sample(places, kinds[places], torch.cat(weights)[order])


def _spread(total: int, count: int) -> Tensor:
    n = min(count, total)
    return torch.arange(n) * total // n
