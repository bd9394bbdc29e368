"""What a packed pipeline says of the files around its transformer, checked against the folder.

Part of the independent proof (see ``verify.py``): a pipeline's own qkit.json lists every file beside the transformer's folder
with its sha256; the transformer's folder has a record of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qkit.declared import FORMAT_VERSION, Fields, Findings, check_fields, is_hash, is_int, is_text, read_json
from qkit.decode import file_sha256

INDEX = "model_index.json"
_RUNS_CODE = (".py", ".so", ".pyc", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_TOP: Fields = {
    "format_version": (lambda v: is_int(v, 1) and v <= FORMAT_VERSION, f"1 to {FORMAT_VERSION}"),
    "qkit_version": (is_text, "a version"),
    "pipeline": (lambda v: is_text(v) and v.isidentifier(), "the name of a component"),
    "files": (lambda v: isinstance(v, dict) and all(map(is_hash, v.values())), "file: sha256"),
}


def packed_part(out: Path, findings: Findings) -> Path:
    """The folder with the packed weights: ``out``, or the component of a pipeline, whose other files are checked here."""
    if not (out / INDEX).is_file():
        return out
    record: dict[str, Any] | None = read_json(out / "qkit.json", findings)
    if record is None or not check_fields(record, _TOP, "qkit.json", findings):
        return out / "transformer"
    part, listed = out / str(record["pipeline"]), record["files"]
    there = {
        str((Path(place) / name).relative_to(out))
        for place, _, names in os.walk(out)
        if part not in (Path(place), *Path(place).parents)
        for name in names
    } - {"qkit.json"}
    for name in sorted({*there, *listed}):
        if not findings.check("pipeline", name in listed, name, "is not listed in qkit.json; remove it"):
            continue
        path = out / name
        sound = name in there and path.is_file() and not path.is_symlink()
        if findings.check("pipeline", sound, name, "is listed in qkit.json and is not a file of the folder"):
            what = "its sha256 is not the one in qkit.json: the file changed after the export"
            findings.check("pipeline", file_sha256(path) == listed[name], name, what)
        findings.check("pipeline", not name.endswith(_RUNS_CODE), name, "can run code when it is read; remove it")
    findings.check("pipeline", part.is_dir(), part.name, "the folder of the packed component is missing")
    return part
