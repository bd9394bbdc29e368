"""Calibration rows, and those of a text file.

A text is tokenised as far as it is needed (no special tokens added) and cut into consecutive rows of ``seqlen`` tokens, of
which the first ``samples`` are used. The same text, tokenizer and numbers give the same rows. ``mixture`` makes rows of records
and of several sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qkit.errors import BadCalibration
from qkit.files.foreign import foreign_errors
from qkit.files.text_file import TextFile

KINDS = ("padding", "text", "vision", "answer")
VISION, ANSWER = KINDS.index("vision"), KINDS.index("answer")


class CallSource(Protocol):
    """A source of model calls that can be read repeatedly and gives the same calls every time."""

    def calls(self, folder: Path) -> Iterator[dict[str, Any]]: ...


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration samples.

    tokens:     int64 [samples, seqlen]; rows with images are padded with zeros to the longest
    digest:     sha256 of the contents of all rows
    inputs:     arguments of the model for each row, for rows with images
    kinds:      uint8 [samples, seqlen], for rows with images: the kind of each token, an index of KINDS
    trajectory: for a diffusion transformer, its calls while the pipeline samples; ``tokens`` is then empty and seqlen 0,
                since the number of tokens is known only when the calls are made
    written:    number of synthetic rows that the model generates when the run begins, besides these
    mask:       bool [samples, seqlen], for rows of text of which not all tokens count: padding, or what is no answer
    understood: what was read of each source of text, for the record; summary: the same in a line each, for a person
    """

    source: str
    samples: int
    seqlen: int
    digest: str
    tokens: Tensor = field(compare=False, repr=False)
    inputs: tuple[dict[str, Tensor], ...] | None = field(default=None, compare=False, repr=False)
    kinds: Tensor | None = field(default=None, compare=False, repr=False)
    trajectory: CallSource | None = field(default=None, compare=False, repr=False)
    written: int = 0
    mask: Tensor | None = field(default=None, compare=False, repr=False)
    understood: tuple[dict[str, Any], ...] = ()
    summary: tuple[str, ...] = field(default=(), compare=False)

    @property
    def row_kinds(self) -> Tensor | None:
        """uint8 [samples, seqlen], the kind of each token, 0 for one that does not count; None: all are text that counts."""
        return self.kinds if self.mask is None else self.mask.to(torch.uint8) * KINDS.index("text")

    @property
    def count(self) -> int:
        """Number of rows, with synthetic rows that are not generated yet."""
        return self.samples + self.written

    @property
    def beyond_text(self) -> bool:
        """Whether rows have more than text, and so reach parts of a model that a text does not."""
        return self.kinds is not None or self.trajectory is not None

    def calls(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Arguments of the model, row after row; data that does not fit into memory is offloaded to ``folder``."""
        if self.trajectory is not None:
            yield from self.trajectory.calls(folder)
            return
        yield from self.inputs if self.inputs is not None else ({"input_ids": row[None]} for row in self.tokens)

    def first(self, count: int) -> Calibration:
        """The first ``count`` rows (or all, if there are fewer), with the same seqlen."""
        tokens, kinds = self.tokens[:count], None if self.kinds is None else self.kinds[:count]
        inputs = None if self.inputs is None else self.inputs[:count]
        mask = None if self.mask is None else self.mask[:count]
        return Calibration(
            source=self.source,
            samples=len(tokens),
            seqlen=self.seqlen,
            digest=digest_of(tokens, inputs, mask),
            tokens=tokens,
            inputs=inputs,
            kinds=kinds,
            mask=mask,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of all fields but the tokens."""
        fields = ("source", "samples", "seqlen", "digest", *(("written",) if self.written else ()))
        sources = {"sources": [dict(u) for u in self.understood]} if self.understood else {}
        return {**{k: getattr(self, k) for k in fields}, **sources}

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        return self  # immutable; dataclasses.asdict would copy the tokens otherwise


def digest_of(tokens: Tensor, inputs: Iterable[dict[str, Tensor]] | None = None, mask: Tensor | None = None) -> str:
    """sha256 of the contents of rows: ``inputs`` of rows with images, else ``tokens``, and which of them count."""
    if inputs is None:
        digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes())
        if mask is not None:
            digest.update(mask.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    digest = hashlib.sha256()
    for row in inputs:
        for name in sorted(row):
            digest.update(name.encode() + row[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """Text of a UTF-8 file. Raises BadCalibration, naming the first byte that is not UTF-8, and IOFailure."""
    return TextFile(path, "calibration text", BadCalibration).text()[0]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text. The Rust tokenizer is used where there is one, without offsets: a quarter less memory."""
    with foreign_errors(
        "the tokenizer of the model cannot read the text", "use the tokenizer's files of the original model"
    ):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def text_tokens(path: Path, tokenizer: Any, samples: int, seqlen: int) -> Tensor:
    """Rows of a text file, int64 [samples, seqlen]. Raises BadCalibration when the text is too short."""
    ids = TextFile(path, "calibration text", BadCalibration).first_tokens(
        partial(token_ids, tokenizer), samples * seqlen
    )
    available = len(ids) // seqlen
    if available < samples:
        raise BadCalibration(
            f"{path}: {len(ids)} tokens are {available} samples of {seqlen} tokens, {samples} are needed "
            f"({samples * seqlen} tokens): use a longer text, or fewer --samples or a shorter --seqlen"
        )
    return torch.tensor(ids[: samples * seqlen], dtype=torch.int64).view(samples, seqlen)


def check_rows(rows: Tensor, where: object, vocabulary: int) -> None:
    """Raises BadCalibration when all rows are equal, or when token ids leave the vocabulary (rows of the embedding table)."""
    outside = int((rows >= vocabulary).sum())
    if outside:
        row = int((rows >= vocabulary).any(1).nonzero()[0])
        raise BadCalibration(
            f"{where}: row {row} has a token id of at least {vocabulary}, the size of the model's vocabulary "
            f"({outside} tokens in all): the tokenizer does not belong to this model"
        )
    if len(rows) > 1 and bool((rows == rows[0]).all()):
        raise BadCalibration(
            f"{where}: all {len(rows)} samples are the same, because the text repeats itself: use another text"
        )
