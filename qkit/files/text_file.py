"""Text files from users: opened only if they are files, read only as far as needed, and refused if they are no text.

The first tokens of a text are wanted, and a text can be much longer than what holds them. A piece of its start is tokenised
instead, which has to give the tokens that the whole text would: words are tokenised by themselves, or depend on their
neighbours alone, so that the end of the piece changes a few tokens before it. Tokens near the end are not used, and a
second piece that ends elsewhere has to give the same ones; where it does not, the whole text is tokenised.
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qkit.errors import BadInput, IOFailure

LIMIT = 1 << 28  # bytes of a text that is read whole
MARGIN = 256  # tokens before the end of a piece that are not used
_PER_TOKEN = 8  # bytes: English has four to five
_LEAST = 1 << 16
_STEP = 4096  # bytes that the second piece is longer by
HEAD = 1 << 16  # bytes that say what a file is
_MAGIC = {
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"PK\x03\x04": "a ZIP archive (or an office document)",
    b"\x1f\x8b": "packed by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ": "packed by xz",
    b"%PDF": "a PDF document",
    b"GGUF": "a GGUF model",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
_CHAT = re.compile(r'"(messages|conversations?|role|from|prompt|completion|instruction)"\s*:')
_IMAGES = re.compile(r'"(images?|video)"\s*:')
_TABLES = {".csv": ",", ".tsv": "\t"}
_COLUMN = re.compile(r"[A-Za-z_][\w .-]{0,40}")


@dataclass(frozen=True)
class TextFile:
    """A text file, read as far as it is needed.

    path: the file; what: what it is for, for messages ('calibration text'); error: what is raised for one that is none.
    """

    path: Path
    what: str
    error: type[BadInput] = BadInput

    def text(self, limit: int | None = None) -> tuple[str, bool]:
        """The first ``limit`` bytes as text, and whether that is all of the file.

        Raises ``error`` for what is no file or no text, IOFailure for one that cannot be read.
        """
        raw, is_all = self._bytes(limit)
        self._refuse_binary(raw)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as e:
            if is_all or e.start < len(raw) - 3:  # else the piece ends within a character
                raise self.error(f"{self.path}: byte {e.start} is not UTF-8: save the {self.what} as UTF-8 text") from e
            text = raw[: e.start].decode("utf-8")
        return text, is_all

    def first_tokens(self, encode: Callable[[str], Sequence[int]], needed: int | None) -> list[int]:
        """At least ``needed`` tokens of the text if it has so many, else all; they are those of the whole text."""
        size = None if needed is None else max(_LEAST, _PER_TOKEN * needed)
        while size is not None and needed is not None:
            text, is_all = self.text(size)
            if is_all:
                return list(encode(text))
            ids = encode(text)
            if len(ids) >= needed + MARGIN:
                longer_ids = encode(self.text(size + _STEP)[0])
                if list(longer_ids[:needed]) == list(ids[:needed]):
                    return list(ids[:needed])
                break
            size *= 2
        return list(encode(self.text()[0]))

    def _bytes(self, limit: int | None) -> tuple[bytes, bool]:
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for a writer
        except (FileNotFoundError, NotADirectoryError, ValueError) as e:
            raise self.error(f"{self.path}: no such {self.what} file") from e
        except OSError as e:
            raise IOFailure(f"{self.path}: cannot be read: {e.strerror}") from e
        try:
            state = os.fstat(handle)
            if stat.S_ISDIR(state.st_mode):
                raise self.error(f"{self.path}: no such {self.what} file: that is a folder")
            if not stat.S_ISREG(state.st_mode):
                raise self.error(
                    f"{self.path}: found a pipe or a device, expected a file: write the {self.what} to a file first"
                )
            if limit is None and state.st_size > LIMIT:
                raise self.error(f"{self.path}: {state.st_size} bytes, expected at most {LIMIT}: use a part of it")
            count = state.st_size if limit is None else min(limit, state.st_size)
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read(count), count >= state.st_size
        except OSError as e:
            raise IOFailure(f"{self.path}: cannot be read: {e.strerror}") from e
        finally:
            os.close(handle)

    def _refuse_binary(self, raw: bytes) -> None:
        kind = next((kind_name for magic, kind_name in _MAGIC.items() if raw.startswith(magic)), None)
        if kind is None and b"\0" in raw[:HEAD]:
            kind = "binary data"
        if kind is not None:
            raise self.error(f"{self.path}: found {kind}, expected plain text: write the {self.what} to a .txt file")


def is_chat(text: str) -> bool:
    """Whether JSON has the fields of a chat, and none of images."""
    return text.lstrip()[:1] in ("{", "[") and bool(_CHAT.search(text)) and not _IMAGES.search(text)


def has_images(text: str) -> bool:
    """Whether JSON has the fields of images."""
    return text.lstrip("\ufeff \t\r\n")[:1] == "{" and bool(_IMAGES.search(text))


def data_in(head: str, suffix: str = "") -> str | None:
    """The kind of data at the start of a file that is no language: a chat, JSON, a table. None for plain text. suffix: of
    the file's name."""
    text = head.lstrip("\ufeff \t\r\n")
    json_kind = _json_in(text) if text[:1] in ("{", "[") else None
    if json_kind is not None:
        return f"a chat file ({json_kind})" if is_chat(text) else json_kind
    if suffix in _TABLES or _is_table(text):
        return "a table (CSV)"
    return None


def _json_in(text: str) -> str | None:
    """Text that starts with a bracket: whole JSON, lines of it, or its beginning."""
    lines = text.split("\n", 1)
    try:
        first, end = json.JSONDecoder().raw_decode(text)
    except RecursionError:
        return "JSON"
    except ValueError:  # cut off, or none: objects with a key in quotes, and lists of these or of texts, are it
        return "JSON" if re.match(r'(\[\s*)*(\{\s*"[^"\n]{1,200}"\s*:|\[\s*"[^"\n]*"\s*,)', text) else None
    if not isinstance(first, (dict, list)) or (isinstance(first, list) and not any(map(_is_rich, first))):
        return None
    remainder = text[end:].lstrip()
    if not remainder:
        return "JSON"
    return "lines of JSON" if len(lines) > 1 and remainder[0] in "{[" else None


def _is_rich(value: object) -> bool:
    return isinstance(value, (dict, list, str))


def _is_table(text: str) -> bool:
    """Whether it begins with names of columns, and lines with as many fields: no prose does."""
    lines = [line for line in text.splitlines()[:12] if line.strip()]
    for separator in (",", "\t"):
        try:
            rows = [*csv.reader(lines[:-1] or lines, delimiter=separator, strict=True)]
        except csv.Error:  # a field over several lines
            continue
        if len(rows) > 2 and 2 <= len(rows[0]) == len({*rows[0]}) and all(map(_COLUMN.fullmatch, rows[0])):
            even = all(len(row) == len(rows[0]) for row in rows)
            if even and not any(field.startswith(" ") for row in rows for field in row[1:]):
                return True
    return False
