"""The check of a packed pipeline: the files around its transformer, and its policy by step.

Part of the independent proof (see ``verify.py``): a pipeline's own qkit.json lists every file beside the transformer's
folder with its sha256; the transformer's folder has a record of its own, which since format version 2 is in that list.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qkit.verification.files import card_note, check_files, check_sum, has_sums, is_summed
from qkit.verification.record import FORMAT_VERSION, Fields, Findings, check_fields, is_hash, is_int, is_text, read_json

INDEX = "model_index.json"
_RUNS_CODE = (".py", ".so", ".pyc", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_TOP: Fields = {
    "format_version": (lambda v: is_int(v, 1) and v <= FORMAT_VERSION, f"1 to {FORMAT_VERSION}"),
    "qkit_version": (is_text, "a version"),
    "pipeline": (lambda v: is_text(v) and v.isidentifier(), "the name of a component"),
    "files": (lambda v: isinstance(v, dict) and all(map(is_hash, v.values())), "file: sha256"),
}


def check_policy(out: Path, linears: Collection[str], findings: Findings) -> None:
    """Checks the policy by step of qkit.json, if there is one: values in range, and layers that exist."""
    data = (read_json(out / "qkit.json", findings) or {}).get("diffusion")
    if data is None or not check_fields(data, _POLICY, "qkit.json: diffusion", findings):
        return
    for name, line in data["fits"].items():
        is_line = isinstance(line, list) and len(line) == 2 and all(map(_is_number, line))
        findings.check("policy", is_line, f"qkit.json: diffusion.fits.{name}", "expected a slope and an offset")
        findings.check("policy", name in linears, f"qkit.json: diffusion.fits.{name}", "is no quantized linear")
    steps = data.get("steps", 0)
    steps_exist = all(is_int(s) and s < steps for s in data.get("computed", ()))
    findings.check("policy", steps_exist, "qkit.json: diffusion.computed", f"expected steps below {steps}")


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
    """The folder with the packed weights: ``out``, or the component of a pipeline that its record names."""
    if not (out / INDEX).is_file() and "pipeline" not in (read_json(out / "qkit.json", Findings()) or {}):
        return out
    record = _record(out, findings)
    return out / (str(record["pipeline"]) if record else "transformer")


def check_around(out: Path, part: Path, findings: Findings) -> list[str]:
    """Checks the files of a pipeline around the packed component ``part``; nothing for a folder that is no pipeline. Gives
    notes."""
    record = None if part == out else _record(out, Findings())
    if record is None:
        return []
    if is_summed(record) and has_sums(record, findings, top=True):
        check_sum(out, record, findings)
    check_files(out, record["files"], [part.name], "pipeline", findings)
    for name in sorted(record["files"]):
        findings.check("pipeline", not name.endswith(_RUNS_CODE), name, "can run code when it is read; remove it")
    findings.check("pipeline", part.is_dir(), part.name, "the folder of the packed component is missing")
    note = card_note(out, record["files"])
    return [] if note is None else [note]


def _record(out: Path, findings: Findings) -> dict[str, Any] | None:
    record = read_json(out / "qkit.json", findings)
    return record if record is not None and check_fields(record, _TOP, "qkit.json", findings) else None
