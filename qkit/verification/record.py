"""A reader of ``qkit.json`` that trusts nothing.

Part of the independent proof of a packed checkpoint (see ``verify.py``): nothing here comes from the
code that writes checkpoints. Every fault becomes a ``Problem``; reading goes on as far as it can, so
that one look shows everything that is wrong.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkit.verification.spec import Spec, spec_fault
from qkit.verification.strict_json import parse_json

FORMAT_VERSION = 2  # of qkit.json; a reader refuses a newer one
USES = ("embeddings", "head")  # of a quantized matrix outside the blocks
MAX_JSON_BYTES = 1 << 28


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: ``where`` (file and tensor or field) and ``what`` (found against expected)."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def printable(text: str) -> str:
    """``text`` with everything that could steer a terminal escaped (names come from files)."""
    return text if text.isprintable() else ascii(text)[1:-1]


@dataclass
class Findings:
    """Problems found so far, and how many checks were made under each topic."""

    problems: list[Problem] = field(default_factory=list)
    checks: Counter[str] = field(default_factory=Counter)

    def check(self, topic: str, ok: bool, where: str, fault: str) -> bool:
        """Counts one check; records a problem unless ``ok``, which it returns."""
        self.checks[topic] += 1
        if not ok:
            self.problems.append(Problem(printable(where), printable(fault)))
        return ok


def as_object(value: Any, topic: str, where: str, findings: Findings) -> dict[str, Any] | None:
    """``value`` when it is a JSON object with something in it; else None, with a problem recorded."""
    content = value if isinstance(value, dict) and value else None
    findings.check(topic, content is not None, where, "expected an object that is not empty")
    return content


def read_json(path: Path, findings: Findings) -> dict[str, Any] | None:
    """The JSON object in ``path``; None, with a problem recorded, where there is none."""
    try:
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("found a link, a folder or a device, expected a regular file")
        if state.st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        data = parse_json(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError("expected a JSON object")
    except OSError as error:
        findings.check("folder", False, path.name, f"cannot be read ({error.strerror}); export the checkpoint again")
        return None
    except ValueError as error:
        findings.check("folder", False, path.name, f"not sound JSON: {error}; export the checkpoint again")
        return None
    findings.check("folder", True, path.name, "")
    return data


# --- fields -------------------------------------------------------------------------------------------------------


def is_int(value: Any, minimum: int = 0) -> bool:
    """Whether a JSON value is a whole number from ``minimum`` on; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_text(value: Any) -> bool:
    """Whether a JSON value is a string that is not empty."""
    return isinstance(value, str) and value != ""


def is_hash(value: Any) -> bool:
    """Whether a JSON value is a sha256 in hex."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a list of sizes."""
    return isinstance(value, list) and all(is_int(n) for n in value)


def is_version(value: Any) -> bool:
    """Whether a JSON value is a release number such as 0.20.1."""
    return isinstance(value, str) and re.fullmatch(r"\d{1,4}(\.\d{1,8}){1,2}[0-9A-Za-z.+-]{0,40}", value) is not None


def _is_error(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0)


Fields = dict[str, tuple[Callable[[Any], bool], str]]
NO_RECORD = (
    "not there: if another tool wrote this folder, 'qkit doctor FOLDER' checks it and says which engines and GPUs load it, and "
    "'qkit verify FOLDER --engine ENGINE --python VENV/bin/python' runs it; if qkit wrote it, export it again"
)
_HASH = (is_hash, "64 hexadecimal digits")
_OBJECT = (lambda v: isinstance(v, dict), "an object")
_SHAPE2 = (lambda v: is_shape(v) and len(v) == 2 and min(v) > 0, "[out_features, in_features]")
_TEXTS = (lambda v: isinstance(v, list) and len(v) > 0 and all(map(is_text, v)), "a list of names")

_TOP: Fields = {
    "qkit_version": (is_version, "a version"),
    "source": _OBJECT,
    "plan_hash": _HASH,
    "recipe": _OBJECT,
    "calibration": (lambda v: v is None or isinstance(v, dict), "an object or null"),
    "linears": (lambda v: isinstance(v, dict) and len(v) > 0, "an object with at least one linear"),
    "skipped": (lambda v: isinstance(v, dict) and all(map(is_text, v.values())), "an object of name: reason"),
    "fused": (lambda v: isinstance(v, list) and all(_TEXTS[0](g) for g in v), "a list of lists of names"),
    "tied": (
        lambda v: isinstance(v, list) and all(_TEXTS[0](p) and len(p) == 2 for p in v),
        "a list of pairs of tensor names",
    ),
    "plain": _OBJECT,
    "shards": (lambda v: isinstance(v, dict) and len(v) > 0 and all(map(is_hash, v.values())), "file: sha256"),
}
_SOURCE: Fields = {
    "fingerprint": _HASH,
    "model_type": (is_text, "a name"),
    "bytes": (lambda v: is_int(v, 1), "a positive number"),
}
_LINEAR: Fields = {
    "format": _OBJECT,
    "activations": (lambda v: v is None or isinstance(v, dict), "an object or null"),
    "shape": _SHAPE2,
    "solver": (is_text, "a name"),
    "error": (_is_error, "a number >= 0 or null"),
    "baseline_error": (_is_error, "a number >= 0 or null"),
    "fallback": (lambda v: v is None or is_text(v), "a reason or null"),
    "weight_sha256": _HASH,
}
_PLAIN: Fields = {"dtype": (is_text, "a dtype"), "shape": (is_shape, "a list of sizes"), "sha256": _HASH}
_FORMAT: Fields = {
    "name": (is_text, "a name"),
    "kind": (lambda v: v in ("int", "fp4", "fp8", "uint", "nl4"), "int, fp4, fp8, uint or nl4"),
    "bits": (lambda v: is_int(v, 1) and v <= 8, "1 to 8"),
    "strategy": (is_text, "a name"),
    "symmetric": (lambda v: isinstance(v, bool), "true or false"),
    "scale": (lambda v: v in ("model", "e4m3", "e8m0", "f16", "super"), "model, e4m3, e8m0, f16 or super"),
    "dynamic": (lambda v: isinstance(v, bool), "true or false"),
    "group": (lambda v: v is None or is_int(v, 1), "a positive number or null"),
    "block": (lambda v: v is None or _SHAPE2[0](v), "[rows, columns] or null"),
}


def check_fields(data: Any, fields: Fields, where: str, findings: Findings) -> bool:
    """True when ``data`` has every one of ``fields`` in its expected form."""
    if not findings.check("record", isinstance(data, dict), where, "expected an object"):
        return False
    valid = True
    for key, (accepts, expected) in fields.items():
        accepted = key in data and accepts(data[key])
        mismatch = "" if accepted else f"found {short(data[key]) if key in data else 'nothing'}, expected {expected}"
        valid &= findings.check("record", accepted, f"{where}.{key}", mismatch)
    return valid


def short(value: Any) -> str:
    """The value as JSON, cut to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- the record ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RecordedLinear:
    """A quantized linear as qkit.json records it; ``shape`` is (out_features, in_features), ``sparse`` how many values its
    sparse part has, ``rank`` that of its low-rank part, ``rotation`` the block of the transform of its inputs, ``scaled``
    whether their channels are multiplied by a stored scale first, ``residual`` how many of them are quantized twice, ``kept``
    whether it is stored as in the source, ``uses`` what a matrix outside the blocks is for, of USES, ``type_name`` the name of
    its format, which says the type of a tensor of GGUF."""

    name: str
    format: Spec
    activations: Spec | None
    shape: tuple[int, int]
    weight_sha256: str
    sparse: int = 0
    rotation: int = 0
    scaled: bool = False
    residual: int = 0
    rank: int = 0
    kept: bool = False
    uses: tuple[str, ...] = ()
    type_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The checked content of qkit.json. Entries that could not be understood are left out; ``cache`` is what it says of
    the KV cache, ``serving`` of the cache that it is to be served with, and ``experts`` of experts that were left out, as it is
    there; ``engine`` what its recipe says of engines;
    ``stock_refusal`` why stock transformers does not load the result, where the model's class shows it."""

    qkit_version: str
    model_type: str
    compressed_tensors: str | None
    linears: dict[str, RecordedLinear]
    skipped: dict[str, str]
    fused: list[list[str]]
    tied: list[tuple[str, str]]
    plain: dict[str, tuple[str, tuple[int, ...], str]]
    shards: dict[str, str]
    cache: Any = None
    serving: Any = None
    experts: Any = None
    transforms: tuple[str, ...] = ()
    engine: str = "default"
    stock_refusal: str = ""


def _read_spec(data: Any, weight: bool, where: str, findings: Findings) -> Spec | None:
    if not check_fields(data, _FORMAT, where, findings):
        return None
    sides = data["block"]
    fields = {key: data[key] for key in _FORMAT if key not in ("name", "block")}
    spec = Spec(**fields, block=(sides[0], sides[1]) if sides else None)
    fault = spec_fault(spec, weight)
    named = data["name"].removeprefix("gguf_").startswith(spec.stem)
    findings.check("record", named, f"{where}.name", f"'{data['name']}' is not a {spec.stem} format")
    return spec if findings.check("record", fault is None, where, str(fault)) else None


def _read_linear(name: str, data: Any, findings: Findings) -> RecordedLinear | None:
    where = f"qkit.json: linears.{name}"
    if not check_fields(data, _LINEAR, where, findings):
        return None
    weights = _read_spec(data["format"], True, f"{where}.format", findings)
    acts = data["activations"]
    activations = _read_spec(acts, False, f"{where}.activations", findings) if acts is not None else None
    if weights is None or (acts is not None and activations is None):
        return None
    rows, columns = data["shape"]
    step = weights.group or (2 if weights.kind == "fp4" else 1)
    if not findings.check(
        "record", columns % step == 0, f"{where}.shape", f"{columns} input columns are not a multiple of {step}"
    ):
        return None
    sparse = data.get("sparse", 0)
    valid = sparse == 0 or (is_int(sparse, 1) and sparse <= rows * columns)
    if not findings.check("record", valid, f"{where}.sparse", f"found {short(sparse)}, expected a number of weights"):
        return None
    rotation = data.get("rotation", 0)
    valid = rotation == 0 or (is_int(rotation, 2) and rotation & (rotation - 1) == 0 and columns % rotation == 0)
    mismatch = f"found {short(rotation)}, expected a block of the columns"
    if not findings.check("record", valid, f"{where}.rotation", mismatch):
        return None
    residual = data.get("residual", 0)
    group = activations.group if activations is not None else None
    divides = group is not None and is_int(residual, 1) and residual % group == 0
    valid = residual == 0 or (divides and residual <= columns)
    mismatch = f"found {short(residual)}, expected a number of groups of input channels"
    if not findings.check("record", valid, f"{where}.residual", mismatch):
        return None
    rank = data.get("rank", 0)
    valid = rank == 0 or (is_int(rank, 1) and rank <= min(rows, columns))
    if not findings.check("record", valid, f"{where}.rank", f"found {short(rank)}, expected a rank of the weight"):
        return None
    uses = data.get("uses", [])
    valid = isinstance(uses, list) and tuple(uses) in ((), USES[:1], USES[1:], USES)
    if not findings.check("record", valid, f"{where}.uses", f"found {short(uses)}, expected some of {', '.join(USES)}"):
        return None
    return RecordedLinear(
        name=name,
        format=weights,
        activations=activations,
        shape=(rows, columns),
        weight_sha256=data["weight_sha256"],
        sparse=sparse,
        rotation=rotation,
        scaled=data.get("scaled") is True,
        residual=residual,
        rank=rank,
        kept=data.get("kept") is True,
        uses=tuple(uses),
        type_name=data["format"]["name"],
    )


def read_record(out: Path, findings: Findings) -> Record | None:
    """qkit.json of the folder ``out``; None, with problems recorded, when it cannot serve as a record."""
    if not os.path.lexists(out / "qkit.json"):
        findings.check("folder", False, "qkit.json", NO_RECORD)
        return None
    data = read_json(out / "qkit.json", findings)
    if data is None:
        return None
    version = data.get("format_version")
    newer, writer = is_int(version, FORMAT_VERSION + 1), short(data.get("qkit_version"))
    mismatch = (
        f"format version {version} was written by qkit {writer} and this one reads up to {FORMAT_VERSION}: "
        f"verify with qkit {writer} or newer"
        if newer
        else f"found {short(version)}, expected {FORMAT_VERSION}"
    )
    is_readable = findings.check("record", not newer and is_int(version, 1), "qkit.json: format_version", mismatch)
    if not is_readable or not check_fields(data, _TOP, "qkit.json", findings):
        return None
    if not check_fields(data["source"], _SOURCE, "qkit.json: source", findings):
        return None
    linears = {name: _read_linear(name, entry, findings) for name, entry in data["linears"].items()}
    plain_tensors = {
        name: (entry["dtype"], tuple(entry["shape"]), entry["sha256"])
        for name, entry in data["plain"].items()
        if check_fields(entry, _PLAIN, f"qkit.json: plain.{name}", findings)
    }
    release, refusal = data.get("compressed_tensors"), data.get("stock_refusal", "")
    findings.check(
        "record", isinstance(refusal, str), "qkit.json: stock_refusal", f"found {short(refusal)}, expected text"
    )
    findings.check("record", release is None or is_version(release), "qkit.json: compressed_tensors", "not a version")
    return Record(
        qkit_version=data["qkit_version"],
        model_type=data["source"]["model_type"],
        compressed_tensors=release if is_version(release) else None,
        linears={name: linear for name, linear in linears.items() if linear},
        skipped=data["skipped"],
        fused=data["fused"],
        tied=[(first, second) for first, second in data["tied"]],
        plain=plain_tensors,
        shards=data["shards"],
        cache=data.get("kv"),
        serving=data.get("serving"),
        experts=data.get("experts"),
        transforms=tuple(map(str, data.get("transforms") or ())),
        engine=str(data["recipe"].get("engine", "default")),
        stock_refusal=printable(refusal) if isinstance(refusal, str) else "",
    )
