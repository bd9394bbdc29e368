"""That a packed folder holds the files that were written, all of them and no other, by the sums in its qkit.json.

Part of the independent proof (see ``verify.py``). Since format version 2 a record has ``files``, {name: sha256} of
everything else in the folder, ``config``, what config.json was written with besides its quantization_config, and ``sum``, the
sha256 of the record without it. A record of version 1 has none of them: then only what the other checks look at is proven.
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
    """Whether the record has the fields of its sums. top: that of what is around the transformer of a pipeline, which has no
    config."""
    return check_fields(record, _SEALED if top else {**_SEALED, **_CONFIG}, RECORD, findings)


def has_mark(folder: Path, findings: Findings) -> bool:
    """Whether 'qkit check' rejected the folder; any other file of that name is a problem."""
    if not os.path.lexists(folder / REJECTED):
        return False
    mark = read_json(folder / REJECTED, findings)
    made = mark is not None and mark.get("made_by") == "qkit check"
    return findings.check("folder", made, REJECTED, "is not the mark that 'qkit check' writes; remove it")


def check_sum(folder: Path, record: Mapping[str, Any], findings: Findings) -> None:
    """A record that is not what was written is a problem."""
    bare = {key: value for key, value in record.items() if key != "sum"}
    found = hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()
    what = f"{short(record['sum'])} is not the sha256 of the rest: qkit.json changed after the export"
    findings.check("record", found == record["sum"], f"{RECORD}: sum", what)
    raw = (folder / RECORD).read_bytes()
    laid_out = raw == (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
    findings.check("record", laid_out, RECORD, "is not laid out as the export writes it: it changed after the export")


def check_config(wanted: Mapping[str, Any], config: Mapping[str, Any], findings: Findings) -> None:
    """Every field of config.json besides its quantization_config, against what the record says it was written with."""
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    _compare(wanted, found, "config.json: ", findings)


def _compare(wanted: Any, found: Any, where: str, findings: Findings) -> None:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted({*wanted, *found}):
            place = f"{where}{key}"
            if key not in wanted:
                findings.check("config", False, place, f"found {short(found[key])}, expected no such field")
            elif key not in found:
                findings.check("config", False, place, f"is missing, expected {short(wanted[key])}")
            else:
                _compare(wanted[key], found[key], f"{place}.", findings)
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, pair in enumerate(zip(wanted, found, strict=True)):
            _compare(*pair, f"{where}{index}.", findings)
    else:
        same = json.dumps(wanted) == json.dumps(found)  # which tells true from 1, and 1 from 1.0
        what = f"found {short(found)}, expected {short(wanted)}"
        findings.check("config", same, where.rstrip("."), what)


def check_files(out: Path, listed: Mapping[str, str], apart: Collection[str], topic: str, findings: Findings) -> None:
    """Every file below ``out`` against ``listed``, {name: sha256}. apart: names, of folders too, that others look at, but for
    those of them that are listed."""
    there, folders = _walk(out, apart)
    there |= {name for name in listed if name.partition("/")[0] in apart and _is_file(out / name)}
    parents = {str(parent) for name in listed for parent in Path(name).parents}
    for name in sorted(folders):
        path = out / name
        if path.is_symlink():
            findings.check(topic, False, name, "is a link; expected a folder")
        else:
            findings.check(topic, name in parents, name, "is a folder that is not listed in qkit.json; remove it")
    for name in sorted({*there, *listed}):
        if name in apart:
            continue
        if not findings.check(topic, name in listed, name, "is not listed in qkit.json; remove it"):
            continue
        if not findings.check(topic, name in there, name, "is listed in qkit.json and is not in the folder"):
            continue
        if findings.check(topic, _is_file(out / name), name, "expected a regular file"):
            what = "its sha256 is not the one in qkit.json: the file changed after the export"
            findings.check(topic, sha256_of(out / name) == listed[name], name, what)


def _walk(out: Path, apart: Collection[str]) -> tuple[set[str], set[str]]:
    """Names, relative to ``out``, of what is there besides ``apart`` and the record: files and links, and folders."""
    files: set[str] = set()
    folders: set[str] = set()
    for place, below, names in os.walk(out):
        root = Path(place).relative_to(out)
        below[:] = [name for name in below if str(root / name) not in apart]
        folders |= {str(root / name) for name in below}
        files |= {str(root / name) for name in names}
    return files - {RECORD, REJECTED, *apart}, folders


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
