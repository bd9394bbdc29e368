"""Calibration rows as batches for a model: its arguments, and the tokens that the loss counts.

Rows of a text go through the model several at a time and every token after the first is scored. Rows with images go one at a
time, and only tokens of answers are scored, all with equal weight: the loss of training with images (MBQ, arXiv 2412.19509,
uses gradients of the same loss).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.calibration.dataset import ANSWER, VISION, Calibration

CHUNK_TOKENS = 1024  # of a forward or backward pass of one worker
InputRows = Tensor | Calibration  # int64 [rows, length] of a text, or calibration rows of a text or with images


@dataclass(frozen=True)
class Batch:
    """Some rows as one call of the model.

    inputs: arguments of the model
    at:     int64 [n], positions before the answer tokens of a row with images; None for rows of a text, where every token
            after the first is scored
    mask:   bool [rows, length - 1], which of these are scored; None: all
    """

    inputs: dict[str, Tensor]
    at: Tensor | None = None
    mask: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """Token ids, int64 [rows, length]."""
        return self.inputs["input_ids"]

    @property
    def targets(self) -> Tensor:
        """The scored tokens, int64 [rows, scored]; with a mask, int64 [1, scored in all rows]."""
        if self.mask is not None:
            return self.ids[:, 1:][self.mask][None]
        return self.ids[:, 1:] if self.at is None else self.ids[:, self.at + 1]

    @property
    def options(self) -> dict[str, Tensor]:
        """Further arguments of a model with a head; for rows with images it returns logits at ``at`` alone."""
        return {} if self.at is None else {"logits_to_keep": self.at}

    def scored(self, logits: Tensor) -> Tensor:
        """Logits of the scored tokens, [rows, scored, vocabulary], from those that the model returned."""
        if self.mask is not None:
            return logits[:, :-1][self.mask.to(logits.device)][None]
        return logits[:, :-1] if self.at is None else logits

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        at, mask = (None if t is None else t.to(device) for t in (self.at, self.mask))
        return Batch({k: v.to(device) for k, v in self.inputs.items()}, at, mask)

    def cloned(self) -> Batch:
        """The batch in tensors that autograd accepts, where the original ones were made in inference mode."""
        at, mask = (None if t is None else t.clone() for t in (self.at, self.mask))
        return Batch({k: v.clone() for k, v in self.inputs.items()}, at, mask)


def batches(rows: InputRows, max_tokens: int = CHUNK_TOKENS) -> tuple[Batch, ...]:
    """Batches for one worker each; those of a text have up to ``max_tokens`` tokens. They do not depend on the workers."""
    if isinstance(rows, Tensor):
        return tuple(Batch({"input_ids": piece}) for piece in rows.split(max(1, max_tokens // rows.shape[1])))
    if rows.inputs is None or rows.kinds is None:
        return _of_text(rows, max_tokens)
    answers = [(k == ANSWER).nonzero()[:, 0] for k in rows.kinds]
    return tuple(Batch(dict(x), at - 1) for x, at in zip(rows.inputs, answers, strict=True))


def _of_text(rows: Calibration, max_tokens: int) -> tuple[Batch, ...]:
    """Batches of rows of a text, with the tokens that are scored."""
    pieces = batches(rows.tokens, max_tokens)
    if rows.mask is None:
        return pieces
    masks = rows.mask[:, 1:].split(max(1, max_tokens // rows.tokens.shape[1]))
    return tuple(Batch(p.inputs, mask=mask) for p, mask in zip(pieces, masks, strict=True))


def single_rows(rows: InputRows) -> tuple[Batch, ...]:
    """A batch for each row, without what stands behind its last token that counts (padding): for what looks at all tokens."""
    if isinstance(rows, Tensor) or rows.mask is None:
        return batches(rows, 1)
    ends = [int(mask.nonzero()[-1]) + 1 for mask in rows.mask]
    return tuple(
        Batch({"input_ids": ids[None, :end]}, mask=mask[None, 1:end])
        for ids, mask, end in zip(rows.tokens, rows.mask, ends, strict=True)
    )


@dataclass(frozen=True)
class Extent:
    """Size of a set of rows.

    length: tokens of the longest row; scored: tokens that the loss counts; chunk: largest number of tokens in one batch
    """

    rows: int
    length: int
    scored: int
    chunk: int


def text_extent(rows: int, length: int) -> Extent:
    """Extent of ``rows`` rows of a text, ``length`` tokens each."""
    return Extent(rows, length, rows * (length - 1), length * min(rows, max(1, CHUNK_TOKENS // length)))


def extent_first(rows: Calibration, count: int) -> Extent:
    """Extent of the first ``count`` rows, also where the model has not generated them yet."""
    made = extent(rows.first(count))
    missing = max(0, min(count, rows.count) - made.rows)
    if not missing:
        return made
    later = text_extent(made.rows + missing, rows.seqlen)
    return replace(later, scored=made.scored + missing * (rows.seqlen - 1))


def extent(rows: Calibration) -> Extent:
    """Extent of calibration rows."""
    if rows.kinds is None:
        size = text_extent(rows.samples, rows.seqlen)
        return size if rows.mask is None else replace(size, scored=int(rows.mask[:, 1:].sum()))
    return Extent(rows.samples, rows.seqlen, int((rows.kinds == ANSWER).sum()), rows.seqlen)


@dataclass(frozen=True)
class Sample:
    """A sample of the tokens of all rows.

    places:        int64 [n], ascending, positions in the concatenated tokens of all rows
    kinds:         uint8 [n], indices of KINDS; None for a text
    sample_weight: float32 [n], how many tokens of its kind each one represents; None for a text
    """

    places: Tensor
    kinds: Tensor | None = None
    sample_weight: Tensor | None = None


def sample(rows: InputRows, count: int) -> Sample:
    """A sample of at most ``count`` tokens, spread evenly over all rows.

    From rows with images it has only image tokens and answer tokens, in equal numbers where there are enough of both.
    """
    if isinstance(rows, Calibration) and rows.mask is not None:
        counted = rows.mask.flatten().nonzero()[:, 0]
        return Sample(counted[_spread(len(counted), count)])
    if isinstance(rows, Tensor) or rows.inputs is None or rows.kinds is None:
        return Sample(_spread((rows if isinstance(rows, Tensor) else rows.tokens).numel(), count))
    kinds = torch.cat([k[: x["input_ids"].shape[1]] for k, x in zip(rows.kinds, rows.inputs, strict=True)])
    places_by_kind = [p for p in ((kinds == k).nonzero()[:, 0] for k in (VISION, ANSWER)) if len(p)]
    chosen = [p[_spread(len(p), count // len(places_by_kind))] for p in places_by_kind]
    weights = [torch.full((len(c),), len(p) / len(c)) for p, c in zip(places_by_kind, chosen, strict=True)]
    places, order = torch.cat(chosen).sort()
    return Sample(places, kinds[places], torch.cat(weights)[order])


def _spread(total: int, count: int) -> Tensor:
    n = min(count, total)
    return torch.arange(n) * total // n
