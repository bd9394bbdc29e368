"""Rows for models that do not continue a text: texts, pairs of texts, sounds, with what is known of them.

A text is cut into windows, as for language models. Of JSON lines each is a row: ``text`` (with ``text_pair``, and ``label``
where it is known), a chat or pair in any form that calibration reads, a preference pair (``chosen`` and ``rejected``: two rows,
of which the first should score higher), ``source`` and ``target``, or ``audio`` (a WAV file, beside the file of lines) and
``text``. Tables and data sets are read as calibration reads them.
"""

from __future__ import annotations

import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.readers import is_plain_text, parsed, records_of
from qkit.calibration.records import Record, read_record
from qkit.calibration.sources import CalibSource, parse_source
from qkit.errors import BadInput
from qkit.evaluation.sources import is_dataset, text_file, text_name
from qkit.files.text_file import LIMIT, TextFile

_PAIRS = (("source", "target"), ("input", "target"))


@dataclass(frozen=True)
class Row:
    """One row. where: its place, for messages; record: its text or chat, None for a sound alone

    second:  a text that goes with it, as its answer or its pair; label: its class, as it was given
    audio:   a sound
    better:  the place of the row in the same file that it should score higher than; None: there is none
    """

    where: str
    record: Record | None
    second: str | None = None
    label: Any = None
    audio: Path | None = None
    better: int | None = None


def source_of(spec: Path | str) -> tuple[str, CalibSource | None]:
    """(name, the source of its rows) of what --text names; no source for a plain text, which is cut into windows."""
    if is_dataset(spec):
        return text_name(spec), parse_source(spec)
    source = parse_source(text_file(spec).path)
    return text_name(spec), None if is_plain_text(source) else source


def read_rows(source: CalibSource, limit: int | None) -> list[Row]:
    """The first ``limit`` rows. Raises BadInput, naming the line, for one that is not understood."""
    lines = not source.is_dataset and source.path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    rows: list[Row] = []
    for group in _json_lines(source.path) if lines else ([Row(r.where, r)] for r in records_of(source).records):
        if limit is not None and len(rows) + len(group) > limit:
            break
        empty = next(
            (row for row in group if row.record is not None and not (row.record.is_chat or row.record.text.strip())),
            None,
        )
        if empty is not None:
            raise BadInput(f"{empty.where}: the text is empty: give a text, or leave the row out")
        rows += [row if row.better is None else _placed(row, len(rows)) for row in group]
    if not rows:
        raise BadInput(f"{source.place}: there is no row: use another file")
    return rows


def _placed(row: Row, before: int) -> Row:
    return Row(row.where, row.record, row.second, row.label, row.audio, before + (row.better or 0))


def _json_lines(path: Path) -> Iterator[list[Row]]:
    text, is_all = TextFile(path, "text").text(LIMIT)
    text = text if is_all else text[: text.rfind("\n") + 1]
    if text.lstrip()[:1] == "[":
        items = ((f"{path}, element {i}", item) for i, item in enumerate(parsed(text, str(path)), 1))
    else:
        numbered = ((f"{path}, line {n}", line) for n, line in enumerate(text.splitlines(), 1) if line.strip())
        items = ((where, parsed(line, where)) for where, line in numbered)
    for where, data in items:
        yield list(_rows_of(data, where, path.parent))


def _rows_of(data: Any, where: str, folder: Path) -> Iterator[Row]:
    """The rows of one line: one, or two of a preference pair."""
    if not isinstance(data, dict):
        yield Row(where, read_record(data, where))
        return
    if data.get("audio") is not None:
        audio, text = data["audio"], data.get("text")
        if not isinstance(audio, str) or not (folder / audio).is_file():
            raise BadInput(f"{where}: audio: there is no file {audio!r} in {folder}: name a WAV file")
        yield Row(where, None if text is None else read_record({"text": text}, where), audio=folder / audio)
        return
    pair = next(((data[a], data[b]) for a, b in _PAIRS if data.get(a) is not None and data.get(b) is not None), None)
    if pair is not None:
        yield Row(where, read_record({"text": pair[0]}, where), second=read_record({"text": pair[1]}, where).text)
        return
    label, second = data.get("label"), data.get("text_pair")
    if second is not None:
        second = read_record({"text": second}, where).text
    if data.get("chosen") is not None and data.get("rejected") is not None:
        yield Row(where, read_record(data, where), better=1)
        yield Row(where, read_record({**data, "chosen": data["rejected"]}, where))
        return
    yield Row(where, read_record(data, where), second, label)


def split_turns(row: Row) -> tuple[str, str]:
    """What a model that reads one text and writes another reads and writes. Raises BadInput for a row that says no answer."""
    record = row.record
    assert record is not None
    if row.second is not None:
        return record.text, row.second
    if not record.is_chat or record.messages[-1]["role"] != "assistant":
        raise BadInput(
            f"{row.where}: a text alone, and this model reads one text and writes another: give prompt and completion, or "
            "source and target"
        )
    return "\n\n".join(m["content"] for m in record.messages[:-1]), str(record.messages[-1]["content"])


def read_sound(path: Path, rate: int) -> Tensor:
    """The samples of a WAV file, float32 [n] from -1 to 1, of one channel. Raises BadInput."""
    try:
        with wave.open(str(path), "rb") as f:
            width, channels, found = f.getsampwidth(), f.getnchannels(), f.getframerate()
            raw = f.readframes(f.getnframes())
    except (wave.Error, EOFError, OSError) as e:
        raise BadInput(f"{path}: no WAV file that can be read ({e}): save the sound as WAV, 16 bits") from e
    if width != 2 or found != rate:
        raise BadInput(
            f"{path}: {8 * width} bits at {found} Hz, expected 16 bits at {rate} Hz, which the model hears: convert the sound"
        )
    samples = torch.frombuffer(bytearray(raw), dtype=torch.int16).float() / 32768
    return samples.reshape(-1, channels).mean(1)
