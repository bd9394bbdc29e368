"""Records of calibration data, from JSON lines, JSON, CSV, Parquet, and data sets of the ``datasets`` package.

Each reader yields records in the order of the file, with the file and the line (or row) that a message has to name. A file
is read to its end, so that a line which is not understood is found wherever it is; of Parquet and of data sets only the rows
that are needed are read.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.calibration.records import FORMS, Record, read_record
from qkit.calibration.sources import CalibSource
from qkit.errors import BadCalibration, BadCheckpoint, Unsupported
from qkit.files.folder import parse_checked
from qkit.files.foreign import foreign_errors
from qkit.files.safefile import shown
from qkit.files.text_file import HEAD, LIMIT, TextFile, data_in
from qkit.system.extras import missing

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_BATCH = 256  # rows of a Parquet file that are read at a time


@dataclass
class Records:
    """The records of one source.

    total: how many there are, None where that is known only at the end; complete: whether all are to be read
    """

    records: Iterator[Record]
    total: int | None = None
    complete: bool = True


def is_plain_text(source: CalibSource) -> bool:
    """Whether a source is a text without records. Raises BadCalibration for a file that is neither, or not there."""
    path = source.path
    if source.is_dataset or _is_parquet(path) or path.suffix.lower() in (*_JSON_SUFFIXES, *_TABLES):
        return False
    head = TextFile(path, "calibration text", BadCalibration).text(HEAD)[0]
    return data_in(head, path.suffix.lower()) is None


def records_of(source: CalibSource) -> Records:
    """The records of a source with records. Raises BadCalibration and Unsupported, also while they are read."""
    if source.is_dataset:
        return _dataset(source)
    path = source.path
    if _is_parquet(path):
        return _parquet(source)
    text, is_all = TextFile(path, "calibration data", BadCalibration).text(LIMIT)
    if not is_all:
        text = text[: text.rfind("\n") + 1]
    text = text.removeprefix("\ufeff")
    if path.suffix.lower() in _TABLES or (text.lstrip()[:1] not in ("{", "[") and path.suffix not in _JSON_SUFFIXES):
        return Records(_table(source, text))
    return Records(_json(source, text))


# ---- JSON --------------------------------------------------------------------------------------------------------


def _json(source: CalibSource, text: str) -> Iterator[Record]:
    """Lines of JSON; or one list, or one object that is a record or holds a list of them."""
    path = source.path
    first = text.lstrip().split("\n", 1)[0].strip()
    whole = first[:1] == "[" or (first[:1] == "{" and not first.endswith("}"))
    if whole and not _is_line(first):
        data = parsed(text, str(path))
        if isinstance(data, dict):
            lists = [v for v in data.values() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
            data = lists[0] if len(data) == 1 and lists and "messages" not in data else [data]
        for number, item in enumerate(data, 1):
            yield read_record(item, f"{path}, element {number}", source.column)
        return
    number = 0
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield read_record(parsed(line, where), where, source.column)


def _is_line(first: str) -> bool:
    """Whether the first line is a list of turns: a record by itself, with others on the next lines."""
    try:
        data = parse_checked(first.encode("utf-8", "surrogatepass"), "")
    except BadCheckpoint:
        return False
    return isinstance(data, list) and bool(data) and all(isinstance(x, dict) and "role" in x for x in data)


def parsed(text: str, where: str) -> Any:
    """The JSON of a file, or of a line of it. where: the place, for messages. Raises BadCalibration."""
    try:
        return parse_checked(text.encode("utf-8", "surrogatepass"), where)
    except BadCheckpoint as e:
        message = str(e).replace(": get the file again from its source", ": correct it")
        if "\n" not in text:  # the place is on this line, whatever its number
            message = re.sub(r"line 1 column (\d+) \(char \d+\)", r"column \1", message)
        raise BadCalibration(message) from e


# ---- tables ------------------------------------------------------------------------------------------------------


def _table(source: CalibSource, text: str) -> Iterator[Record]:
    """Rows of CSV, or of a table with tabs, under a line with the names of the columns."""
    path, lines = source.path, text.split("\n", 1)
    tabs = path.suffix.lower() == ".tsv" or (path.suffix.lower() != ".csv" and lines[0].count("\t") >= 1)
    before = csv.field_size_limit(LIMIT)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
        rows = _rows(reader, path)
        names = next(rows, [])
        _check_columns(source, names, f"{path}, line 1")
        start = reader.line_num + 1
        for row in rows:
            where = f"{path}, line {start}"
            start = reader.line_num + 1
            if not row:
                continue
            if len(row) != len(names):
                raise BadCalibration(
                    f"{where}: {len(row)} fields, expected {len(names)} as in the first line: quote fields with commas"
                )
            yield read_record(dict(zip(names, row, strict=True)), where, source.column)
    finally:
        csv.field_size_limit(before)


def _rows(reader: Any, path: Path) -> Iterator[list[str]]:
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise BadCalibration(f"{path}, line {reader.line_num}: no CSV ({e}): save the table again") from e


def _check_columns(source: CalibSource, names: list[str], where: str) -> None:
    """Raises BadCalibration where the named column is not there, or none is named and none is known."""
    columns = ", ".join(shown(n, 30)[1:-1] for n in names[:12]) or "none"
    if source.column is not None and source.column not in names:
        raise BadCalibration(
            f"{where}: there is no column {shown(source.column, 40)}, found {columns}: name one of these"
        )
    known = {
        "text",
        "messages",
        "conversations",
        "conversation",
        "chosen",
        "instruction",
        "prompt",
        "question",
        "query",
    }
    if source.column is None and not known & {*names}:
        raise BadCalibration(
            f"{where}: no column says what it is, found {columns}, expected {FORMS}: name the column to read, "
            f"--calib {source.name}:COLUMN"
        )


def _is_parquet(path: Path) -> bool:
    """Whether a file is a Parquet table, by its first bytes or, where it cannot be read, its name."""
    if not path.is_file():
        return path.suffix.lower() == ".parquet"
    with path.open("rb") as f:
        return f.read(4) == b"PAR1" or path.suffix.lower() == ".parquet"


def _parquet(source: CalibSource) -> Records:
    try:
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise missing(f"{source.name}: a Parquet file", "eval", "pyarrow") from e
    path = source.path
    if not path.is_file():
        raise BadCalibration(f"{path}: no such calibration data file")
    with foreign_errors(f"{path}: no Parquet file that pyarrow can read", "save the table again", BadCalibration):
        file = parquet.ParquetFile(path)
        names, total = list(file.schema_arrow.names), file.metadata.num_rows
    _check_columns(source, names, str(path))

    def rows() -> Iterator[Record]:
        columns = None if source.column is None else [source.column]
        batches, number = file.iter_batches(batch_size=_BATCH, columns=columns), 0
        while True:
            with foreign_errors(f"{path}, row {number}: cannot be read", "save the table again", BadCalibration):
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            if batch is None:
                return
            for row in rows:
                yield read_record(row, f"{path}, row {number}", source.column)
                number += 1

    return Records(rows(), total, complete=False)


# ---- data sets ---------------------------------------------------------------------------------------------------


def load_dataset(source: CalibSource) -> Any:
    """A data set of the ``datasets`` package. Raises Unsupported without the package, BadCalibration for one that cannot be
    loaded."""
    try:
        import datasets
    except ImportError as e:
        raise Unsupported(f"{source.place} needs the datasets package: pip install 'qkit[eval]'") from e
    name, config, split = source.dataset
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # each of its retries would be a line, before the sentence that tells of the last
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
        reason = (str(e).strip() or type(e).__name__).partition("\n")[0].rstrip(".")
        raise BadCalibration(
            f"{source.place}: cannot be loaded ({reason}): check the name and the network, or use a file"
        ) from e
    finally:
        hub.setLevel(level)


def _dataset(source: CalibSource) -> Records:
    data = load_dataset(source)
    _check_columns(source, list(data.column_names), source.place)

    def rows() -> Iterator[Record]:
        for number in range(len(data)):
            yield read_record(data[number], f"{source.place}, row {number}", source.column)

    return Records(rows(), len(data), complete=False)
