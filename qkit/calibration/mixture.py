"""Calibration rows from one or several sources of text and chats, and what was understood of each.

Packed rows (the default) are cut from the tokens of all records of a source, one behind the other, so that no row has padding.
Padded rows hold one record each, cut to ``seqlen`` and filled up; what they are filled up with is in no statistic. With
``answers_only`` the same holds for every token that is not part of an answer. Records are used in the order of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.chats import Chats, Tokens
from qkit.calibration.dataset import Calibration, check_rows, digest_of, text_tokens
from qkit.calibration.readers import is_plain_text, records_of
from qkit.calibration.records import Record
from qkit.calibration.sources import CalibSource, interleaved, shares
from qkit.errors import BadCalibration, BadInput, UsageError
from qkit.system.memory import give_back

CHATS = 6  # one in so many rows of the embedded data is of chats: our choice
_AT_ONCE = 32  # records that are rendered and tokenised together


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows are made: their number and length, and which tokens count."""

    samples: int
    seqlen: int
    padded: bool = False
    answers_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Understood:
    """What was read of a source.

    form: of its records, or 'text'; records: how many of them were used; total: how many there are, None for a text;
    counted: tokens in statistics; cut_off: share of the tokens of the used records that are in no row; template: sha256 of the
    chat template that wrote the chats, '' where the model has none, None without chats; passed: records without a token that
    counts
    """

    source: str
    weight: float
    form: str
    rows: int
    tokens: int
    counted: int
    records: int = 0
    total: int | None = None
    cut_off: float = 0.0
    template: str | None = None
    passed: int = 0

    def to_json(self) -> dict[str, Any]:
        """All that says something, as a JSON-able dictionary."""
        data = {k: v for k, v in self.__dict__.items() if v is not None}
        return {k: v for k, v in data.items() if v or k not in ("passed", "records", "cut_off")}

    def __str__(self) -> str:
        """A line for a person."""
        line = f"{self.source}: {self.rows} samples, {self.tokens} tokens"
        if self.counted != self.tokens:
            line += f" ({self.counted} of them in statistics)"
        if self.records:
            line += f", from {self.records}{f' of {self.total}' if self.total else ''} records ({self.form})"
        if self.template is not None:
            line += (
                ", by the chat template of the model"
                if self.template
                else ", as plain text: the model has no chat template"
            )
        line += f"; {100 * self.cut_off:.1f} % of their tokens cut off" if self.records else ""
        return line + (f"; {self.passed} records left out: none of their tokens counts" if self.passed else "")


@dataclass(frozen=True)
class SourceRows:
    """Rows of one source. tokens: int64 [rows, seqlen]; mask: bool of the same shape, True for tokens that count"""

    tokens: Tensor
    mask: Tensor
    understood: Understood


def mixed_rows(sources: Sequence[CalibSource], tokenizer: Any, layout: Layout, vocabulary: int) -> Calibration:
    """Calibration rows of all sources, in proportion to their weights and in turn.

    Raises BadCalibration for a source that is too short, that is not understood (naming the line), or whose rows are all alike,
    and UsageError for one that would give no row.
    """
    counts = shares([s.weight for s in sources], layout.samples)
    unused = next((s for s, count in zip(sources, counts, strict=True) if not count), None)
    if unused is not None:
        raise UsageError(
            f"--samples {layout.samples}: {unused.name} would give none of them by its weight: use more samples, or a larger "
            "weight"
        )
    given = [
        rows_of_source(source, tokenizer, replace(layout, samples=count), vocabulary)
        for source, count in zip(sources, counts, strict=True)
    ]
    give_back()  # tokenising leaves several times the text behind
    return together(given, layout, " + ".join(s.name for s in sources))


def embedded_rows(
    text: CalibSource, chats: CalibSource, tokenizer: Any, layout: Layout, vocabulary: int
) -> Calibration:
    """Calibration rows of the embedded data: a text and, for a model with a chat template, chats in it.

    Of the rows one in CHATS is of chats, or as many as there are. The text has dialogue as well, and is all that a model gets
    whose folder has no chat template, or one that fails (which the summary says).
    """
    given, note, name = list[SourceRows](), "", "embedded calibration text"
    try:
        count = layout.samples // CHATS if Chats(tokenizer).template is not None else 0
        if count:
            made = _of_records(chats, tokenizer, replace(layout, samples=count), at_most=True)
            check_rows(made.tokens, chats.name, vocabulary)
            given += [made] if len(made.tokens) else []
    except BadInput as e:
        note = f"{chats.name} is left out: {e}"
    remaining = layout.samples - sum(len(g.tokens) for g in given)
    given.insert(0, rows_of_source(text, tokenizer, replace(layout, samples=remaining), vocabulary))
    give_back()
    rows = together(given, layout, f"{name} and chats" if len(given) > 1 else name)
    lines = tuple(line.replace(":", " (comes with qkit):", 1) for line in rows.summary)
    return replace(rows, summary=(*lines, note) if note else lines)


def no_rows(layout: Layout) -> Calibration:
    """No rows: all of them are synthetic ones, which the model generates."""
    tokens = torch.empty(0, layout.seqlen, dtype=torch.int64)
    return Calibration(source="synthetic", samples=0, seqlen=layout.seqlen, digest=digest_of(tokens), tokens=tokens)


def together(given: Sequence[SourceRows], layout: Layout, name: str) -> Calibration:
    """One calibration of the rows of several sources, which take turns."""
    order = interleaved([len(g.tokens) for g in given])
    tokens = torch.stack([given[s].tokens[row] for s, row in order])
    mask = torch.stack([given[s].mask[row] for s, row in order])
    counted = None if bool(mask.all()) else mask
    return Calibration(
        source=name,
        samples=len(tokens),
        seqlen=layout.seqlen,
        digest=digest_of(tokens, mask=counted),
        tokens=tokens,
        mask=counted,
        understood=tuple(g.understood.to_json() for g in given),
        summary=tuple(str(g.understood) for g in given),
    )


def rows_of_source(source: CalibSource, tokenizer: Any, layout: Layout, vocabulary: int) -> SourceRows:
    """The rows of one source. Raises as ``mixed_rows`` does."""
    plain = is_plain_text(source)
    made = _of_text(source, tokenizer, layout) if plain else _of_records(source, tokenizer, layout)
    check_rows(made.tokens, source.name if source.is_dataset else source.path, vocabulary)
    return made


def _of_text(source: CalibSource, tokenizer: Any, layout: Layout) -> SourceRows:
    if source.column is not None:
        raise BadCalibration(f"{source.path}: a plain text has no column {source.column}: leave it out")
    if layout.answers_only:
        raise BadCalibration(f"{source.path}: a plain text has no answers: leave --answers-only out, or use chats")
    tokens = text_tokens(source.path, tokenizer, layout.samples, layout.seqlen)
    count = tokens.numel()
    understood = Understood(
        source=source.name, weight=source.weight, form="text", rows=len(tokens), tokens=count, counted=count
    )
    return SourceRows(tokens, torch.ones_like(tokens, dtype=torch.bool), understood)


# ---- records -----------------------------------------------------------------------------------------------------


@dataclass
class _Taken:
    """What was taken of a source so far.

    seen: records that were read; records: those in rows; used: their tokens; passed: records without a token that counts;
    forms: of records, in order of appearance
    """

    seen: int = 0
    records: int = 0
    used: int = 0
    passed: int = 0
    chats: bool = False
    forms: dict[str, None] = field(default_factory=dict)

    def counting(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records, counted."""
        for record in records:
            self.seen += 1
            yield record


def _of_records(source: CalibSource, tokenizer: Any, layout: Layout, at_most: bool = False) -> SourceRows:
    opened, chats, taken = records_of(source), Chats(tokenizer), _Taken()
    records = taken.counting(opened.records)
    rows = list(islice(_rows(_tokens(records, chats, layout, taken), layout, taken), layout.samples))
    if len(rows) < layout.samples and not at_most:
        raise _too_few(source, layout, len(rows), taken)
    if opened.complete:
        for _ in records:  # a line that is not understood is found wherever it is
            pass
    tokens, mask = _tensors(rows, layout, tokenizer)
    kept = int(sum(len(ids) for ids, _ in rows))
    understood = Understood(
        source=source.name,
        weight=source.weight,
        form=", ".join(taken.forms),
        rows=len(rows),
        tokens=kept,
        counted=int(mask.sum()),
        records=taken.records,
        total=opened.total if opened.total is not None else taken.seen,
        cut_off=round(1 - kept / taken.used, 4) if taken.used else 0.0,
        template=chats.digest if taken.chats else None,
        passed=taken.passed,
    )
    return SourceRows(tokens, mask, understood)


def _tokens(records: Iterator[Record], chats: Chats, layout: Layout, taken: _Taken) -> Iterator[Tokens]:
    """The tokens of each record that has any."""
    while batch := list(islice(records, _AT_ONCE)):
        for record, tokens in zip(batch, chats.tokens(batch, layout.answers_only), strict=True):
            if len(tokens.ids) < 2 or (tokens.answers is not None and not any(tokens.answers)):
                taken.passed += bool(tokens.ids)
                continue
            taken.chats |= record.is_chat
            taken.forms[record.form] = None
            yield tokens


_Row = tuple[list[int], list[bool]]


def _rows(tokens: Iterator[Tokens], layout: Layout, taken: _Taken) -> Iterator[_Row]:
    """Rows of at most ``seqlen`` token ids, each with a mark whether it counts."""
    cut: Callable[[Iterator[Tokens], int, _Taken], Iterator[_Row]] = _padded if layout.padded else _packed
    for ids, marks in cut(tokens, layout.seqlen, taken):
        if any(marks[1:]):  # the first token of a row is never scored
            yield ids, marks


def _padded(tokens: Iterator[Tokens], seqlen: int, taken: _Taken) -> Iterator[_Row]:
    for item in tokens:
        marks = [True] * len(item.ids) if item.answers is None else item.answers
        if not any(marks[1:seqlen]):
            taken.passed += 1
            continue
        taken.records += 1
        taken.used += len(item.ids)
        yield item.ids[:seqlen], marks[:seqlen]


def _packed(tokens: Iterator[Tokens], seqlen: int, taken: _Taken) -> Iterator[_Row]:
    ids, marks = list[int](), list[bool]()
    for item in tokens:
        taken.records += 1
        taken.used += len(item.ids)
        ids += item.ids
        marks += [True] * len(item.ids) if item.answers is None else item.answers
        ends = range(seqlen, len(ids) + 1, seqlen)
        for end in ends:
            yield ids[end - seqlen : end], marks[end - seqlen : end]
        done = len(ends) * seqlen
        ids, marks = ids[done:], marks[done:]


def _tensors(rows: Sequence[_Row], layout: Layout, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """int64 and bool [rows, seqlen]; rows are filled up at their end, where a causal model cannot see it from the row."""
    padding = getattr(tokenizer, "pad_token_id", None)
    tokens = torch.full((len(rows), layout.seqlen), padding if isinstance(padding, int) else 0, dtype=torch.int64)
    mask = torch.zeros(len(rows), layout.seqlen, dtype=torch.bool)
    for i, (ids, marks) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[i, : len(ids)] = torch.tensor(marks)
    return tokens, mask


def _too_few(source: CalibSource, layout: Layout, found: int, taken: _Taken) -> BadCalibration:
    where = source.place if source.is_dataset else str(source.path)
    if not taken.records:
        why = "no record in it has a token that counts" if taken.passed else "there is no record in it"
        return BadCalibration(f"{where}: {why}: use other data")
    what = f"{taken.records} records with {taken.used} tokens"
    more = "more records" if layout.padded else f"more records ({layout.samples * layout.seqlen} tokens)"
    return BadCalibration(
        f"{where}: {what} are {found} samples of {layout.seqlen} tokens, {layout.samples} are needed: use {more}, or fewer "
        f"--samples{'' if layout.padded else ' or a shorter --seqlen'}"
    )
