"""What a packed pipeline says of the files around its transformer, checked against the folder.

Part of the independent proof (see ``verify.py``): a pipeline's own qkit.json lists every file beside the transformer's folder
with its sha256; the transformer's folder has a record of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
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


def check_policy(out: Path, linears: Collection[str], findings: Findings) -> None:
    """What qkit.json says is decided by step, if anything: numbers that can be, and layers that are there."""
    data = (read_json(out / "qkit.json", findings) or {}).get("diffusion")
    if data is None or not check_fields(data, _POLICY, "qkit.json: diffusion", findings):
        return
    for name, line in data["fits"].items():
        pair = isinstance(line, list) and len(line) == 2 and all(map(_is_number, line))
        findings.check("policy", pair, f"qkit.json: diffusion.fits.{name}", "expected a slope and an offset")
        findings.check("policy", name in linears, f"qkit.json: diffusion.fits.{name}", "is no quantized linear")
    steps = data.get("steps", 0)
    fits = all(is_int(s) and s < steps for s in data.get("computed", ()))
    findings.check("policy", fits, "qkit.json: diffusion.computed", f"expected steps below {steps}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_weight(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[1] >= 0


def _are_gains(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(g) and 0 <= g <= 2 for g in value)


_POLICY: Fields = {
    "kind": (lambda v: v in ("dmpq", "static", "decoupled"), "dmpq, static or decoupled"),
    "fits": (lambda v: isinstance(v, dict), "an object of layers"),
    "threshold": (lambda v: v in ("inf", "-inf") or _is_number(v), "a number"),
    "tau": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "purify": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "most": (lambda v: is_int(v) and v <= 2, "0 to 2"),
    "computed": (lambda v: isinstance(v, list), "a list of steps"),
    "by_block": (lambda v: isinstance(v, list) and all(_is_number(w) and w >= 0 for w in v), "numbers >= 0"),
    "by_time": (
        lambda v: isinstance(v, list) and all(map(_is_weight, v)) and v == sorted(v),
        "times with numbers >= 0",
    ),
    "gains": (lambda v: isinstance(v, dict) and all(map(_are_gains, v.values())), "lists of numbers by step"),
    "steps": (is_int, "a number"),
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
    for place, folders, _ in os.walk(out):
        for name in (n for n in folders if (Path(place) / n).is_symlink()):
            findings.check(
                "pipeline", False, str((Path(place) / name).relative_to(out)), "is a link; expected a folder"
            )
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
