"""The check that a packed folder holds the files that were written, all of them and no other, by the sums in its qkit.json.

Part of the independent proof (see ``verify.py``). Since format version 2 a record has ``files``, {name: sha256} of
everything else in the folder, ``config``, what config.json was written with besides its quantization_config, and ``sum``,
the sha256 of the record without it. A record of version 1 has none of them: then only what the other checks look at is
proven.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qkit.verification.decode import file_sha256
from qkit.verification.record import Fields, Findings, check_fields, is_hash, is_int, read_json, short

RECORD = "qkit.json"
REJECTED = "qkit-rejected.json"  # the mark of 'qkit check', the one file that comes after the export
CARD = "README.md"  # the user's to edit: no loader reads it
_SUMMED = 2  # the format version from which records have sums
_KEPT = ("files", "config", "sum")

_SEALED: Fields = {
    "files": (lambda v: isinstance(v, dict) and all(map(is_hash, v.values())), "an object of file: sha256"),
    "sum": (is_hash, "64 hexadecimal digits"),
}
_CONFIG: Fields = {"config": (lambda v: isinstance(v, dict), "an object")}


def is_summed(record: Mapping[str, Any]) -> bool:
    """Whether a record has to have sums: by its version, or because it has a part of them."""
    return is_int(record.get("format_version"), _SUMMED) or any(key in record for key in _KEPT)


def has_sums(record: Mapping[str, Any], findings: Findings, top: bool = False) -> bool:
    """Whether the record has the fields of its sums. top: whether it is the record around the transformer of a pipeline,
    which has no config."""
    return check_fields(record, _SEALED if top else {**_SEALED, **_CONFIG}, RECORD, findings)


def has_mark(folder: Path, findings: Findings) -> bool:
    """Whether 'qkit check' rejected the folder; any other file of that name is a problem."""
    if not os.path.lexists(folder / REJECTED):
        return False
    mark = read_json(folder / REJECTED, findings)
    is_mark = mark is not None and mark.get("made_by") == "qkit check"
    return findings.check("folder", is_mark, REJECTED, "is not the mark that 'qkit check' writes; remove it")


def check_sum(folder: Path, record: Mapping[str, Any], findings: Findings) -> None:
    """Records a problem for a record that changed after the export."""
    unsummed = {key: value for key, value in record.items() if key != "sum"}
    digest = hashlib.sha256(json.dumps(unsummed, sort_keys=True).encode()).hexdigest()
    fault = f"{short(record['sum'])} is not the sha256 of the rest: qkit.json changed after the export"
    findings.check("record", digest == record["sum"], f"{RECORD}: sum", fault)
    raw = (folder / RECORD).read_bytes()
    laid_out = raw == (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
    findings.check("record", laid_out, RECORD, "is not laid out as the export writes it: it changed after the export")


def check_config(recorded: Mapping[str, Any], config: Mapping[str, Any], findings: Findings) -> None:
    """Compares every field of config.json, besides its quantization_config, with the record."""
    present = {key: value for key, value in config.items() if key != "quantization_config"}
    _compare(recorded, present, "config.json: ", findings)


def _compare(expected: Any, actual: Any, where: str, findings: Findings) -> None:
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in sorted({*expected, *actual}):
            field = f"{where}{key}"
            if key not in expected:
                findings.check("config", False, field, f"found {short(actual[key])}, expected no such field")
            elif key not in actual:
                findings.check("config", False, field, f"is missing, expected {short(expected[key])}")
            else:
                _compare(expected[key], actual[key], f"{field}.", findings)
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        for index, pair in enumerate(zip(expected, actual, strict=True)):
            _compare(*pair, f"{where}{index}.", findings)
    else:
        equal = json.dumps(expected) == json.dumps(actual)  # which tells true from 1, and 1 from 1.0
        fault = f"found {short(actual)}, expected {short(expected)}"
        findings.check("config", equal, where.rstrip("."), fault)


def check_files(
    out: Path, listed: Mapping[str, str], excluded: Collection[str], topic: str, findings: Findings
) -> None:
    """Compares every file below ``out`` with ``listed``, {name: sha256}. excluded: names, of folders too, that other checks
    look at, except those of them that are listed. The card may have any content (``card_note``)."""
    if _is_file(out / CARD) or not os.path.lexists(out / CARD):  # a folder of that name could hold anything
        excluded = [*excluded, CARD]
    present, folders = _walk(out, excluded)
    present |= {name for name in listed if name.partition("/")[0] in excluded and _is_file(out / name)}
    parents = {str(parent) for name in listed for parent in Path(name).parents}
    for name in sorted(folders):
        path = out / name
        if path.is_symlink():
            findings.check(topic, False, name, "is a link; expected a folder")
        else:
            findings.check(topic, name in parents, name, "is a folder that is not listed in qkit.json; move it away")
    for name in sorted({*present, *listed}):
        if name in excluded:
            continue
        if not findings.check(topic, name in listed, name, "is not listed in qkit.json; move it away"):
            continue
        if not findings.check(topic, name in present, name, "is listed in qkit.json and is not in the folder"):
            continue
        if findings.check(topic, _is_file(out / name), name, "expected a regular file"):
            fault = "its sha256 is not the one in qkit.json: the file changed after the export"
            findings.check(topic, sha256_of(out / name) == listed[name], name, fault)


def _walk(out: Path, excluded: Collection[str]) -> tuple[set[str], set[str]]:
    """Names, relative to ``out``, of what is there besides ``excluded`` and the record: files and links, and folders."""
    files: set[str] = set()
    folders: set[str] = set()
    for directory, subfolders, names in os.walk(out):
        root = Path(directory).relative_to(out)
        subfolders[:] = [name for name in subfolders if str(root / name) not in excluded]
        folders |= {str(root / name) for name in subfolders}
        files |= {str(root / name) for name in names}
    return files - {RECORD, REJECTED, *excluded}, folders


def card_note(out: Path, listed: Mapping[str, str]) -> str | None:
    """What became of the card since the export, which is no problem; None where it is as it was."""
    if not os.path.lexists(out / CARD):
        return f"{CARD} was removed" if CARD in listed else None
    if not _is_file(out / CARD):  # a problem, which check_files has; reading a pipe would wait for ever
        return None
    if CARD not in listed:
        return f"{CARD} was added"
    return None if sha256_of(out / CARD) == listed[CARD] else f"{CARD} was edited"


def sha256_of(path: Path) -> str | None:
    """The sha256 of a file; None where it cannot be read."""
    try:
        return file_sha256(path)
    except OSError:
        return None


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
