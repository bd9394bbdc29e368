"""The independent proof of a packed checkpoint: everything is read back from disk and nothing is believed.

This program shares no code with the one that writes checkpoints: its own reading of the layouts (``decode``), of the
quantization config (``quantization_config``) and of qkit.json (``record``), on numpy and the safetensors library alone. A
packed checkpoint passes when every linear of the record is there with exactly the tensors its format needs, every stored
number is possible, every decoded weight is, bit for bit, the one that was intended, the config says so, and every other
file of the folder is the one that was written (``files``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qkit.errors import BadCheckpoint
from qkit.verification.cache_engines import cache_kind
from qkit.verification.decode import FLOATS, DecodedLinear, StoredTensor
from qkit.verification.experts import check_experts, check_source
from qkit.verification.files import card_note, check_config, check_files, check_sum, has_mark, has_sums, is_summed
from qkit.verification.fused_layers import check_fused
from qkit.verification.gguf import MODEL, check_gguf, is_gguf
from qkit.verification.gguf_engines import gguf_rows
from qkit.verification.inputs import check_inputs
from qkit.verification.kv_cache import check_cache
from qkit.verification.layout_config import method_of, read_layout
from qkit.verification.layouts import decode_stored, stored_layout
from qkit.verification.model_engines import ANYWHERE, Deployment, EngineRow, LinearStorage, engine_rows
from qkit.verification.pipeline import check_around, check_policy, packed_part
from qkit.verification.quantization_config import (
    ConfigGroup,
    QuantizationConfig,
    is_ignored,
    read_quantization,
    resolve,
)
from qkit.verification.record import Findings, Problem, Record, RecordedLinear, printable, read_json, read_record
from qkit.verification.relations import check_job, check_tied, config_value
from qkit.verification.shards import read_folder

REJECTED_NOTE = "'qkit check' rejected this result: a limit of its budget was not kept"
UNSUMMED_NOTE = (
    "written before qkit kept the sha256 of every file: the tokenizer, other files beside the weights and most fields of "
    "config.json are not covered; quantize again to have them"
)
_MISSING = "is missing"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of ``verify``. ``bytes``: of all shards; ``checks``: how many were made under each topic; ``notes``:
    further remarks."""

    problems: list[Problem] = field(default_factory=list)
    linears: int = 0
    skipped: int = 0
    bytes: int = 0
    engines: list[EngineRow] = field(default_factory=list)
    checks: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON-able dictionary, with ``ok``."""
        return {"ok": self.ok, **asdict(self)}


def verify(out: Path, job: Path | None = None, source: Path | None = None) -> Report:
    """The report of a check of the packed checkpoint in the folder ``out``; with ``job``, also against that job's journal, and
    with ``source``, the folder of the model that it was made from, experts that were left out against that.

    All problems are reported, not only the first; a missing or damaged file is a problem like any other.
    Raises BadCheckpoint when ``out`` is not a folder, or ``job`` holds no journal.
    """
    if not out.is_dir():
        raise BadCheckpoint(f"{out}: not a folder: use the folder of a result")
    findings = Findings()
    part = packed_part(out, findings)
    report = _check_packed(part, job, source, findings) if part.is_dir() else Report()
    around = check_around(out, part, findings)
    notes = [*report.notes, *around, *([REJECTED_NOTE] if has_mark(out, findings) else [])]
    return replace(report, problems=findings.problems, checks=dict(findings.checks), notes=notes)


def _check_packed(out: Path, job: Path | None, source: Path | None, findings: Findings) -> Report:
    """The folder with the packed weights. What says most of a fault is looked at first, sums of whole files last."""
    record, config = read_record(out, findings), read_json(out / "config.json", findings)
    data = read_json(out / "qkit.json", Findings()) or {}
    summed = is_summed(data) and has_sums(data, findings)
    if summed and config is not None:
        check_config(data["config"], config, findings)
    in_gguf = is_gguf(config)
    headers = {} if in_gguf else read_folder(out, record, findings)
    engines, notes = list[EngineRow](), list[str]()
    if in_gguf and config is not None:
        check_gguf(out, record, config, findings)
        engines = gguf_rows(x.type_name for x in record.linears.values()) if record is not None else []
    elif record is not None:
        engines, notes = _check_record(out, record, config, headers, (job, source), findings)
        _gather_missing([name for name in record.shards if name not in headers], findings)
    if summed:
        check_sum(out, data, findings)
        check_files(out, data["files"], [path.name for path in _weight_files(out)], "files", findings)
        notes += [note] if (note := card_note(out, data["files"])) else []
    return Report(
        linears=len(record.linears) if record else 0,
        skipped=len(record.skipped) if record else 0,
        bytes=sum(path.stat().st_size for path in _weight_files(out)),
        engines=engines,
        notes=[*([] if is_summed(data) or not (out / "qkit.json").exists() else [UNSUMMED_NOTE]), *notes],
    )


def _gather_missing(unread: Sequence[str], findings: Findings) -> None:
    """Tensors that are missing where a file of weights could not be read are one problem, and not one each."""
    missing = [problem for problem in findings.problems if problem.what.startswith(_MISSING)]
    if unread and missing:
        kept = [problem for problem in findings.problems if problem not in missing]
        fault = f"{len(missing)} tensors are missing that may have been in it: no other check was made of them"
        findings.problems[:] = [*kept, Problem(unread[0], fault)]


def _weight_files(out: Path) -> list[Path]:
    return [*out.glob("*.safetensors"), *out.glob(MODEL)]


def _check_record(
    out: Path,
    record: Record,
    config: dict[str, Any] | None,
    headers: Mapping[str, Mapping[str, StoredTensor]],
    beside: tuple[Path | None, Path | None],
    findings: Findings,
) -> tuple[list[EngineRow], list[str]]:
    """Tensors and config against the record, and (job, source) where they are given; returns the engine table, and notes."""
    job, source = beside
    store = {name: stored for tensors in headers.values() for name, stored in tensors.items()}
    quantization, groups = _read_config(out, config, record, findings)
    decoded = _check_linears(record, groups, store, _model_floats(config or {}, record, findings), findings)
    _check_plain(record, store, findings)
    if quantization is not None:
        _check_uncovered(record, quantization, store, findings)
    check_fused(record, decoded, findings, by_name="_class_name" not in (config or {}))
    check_tied(record, config or {}, store, findings)
    check_cache(record, config or {}, store, findings)
    check_inputs(record, store, findings)
    check_policy(out, record.linears, findings)
    sound = check_experts(record, config or {}, store, findings)
    notes = check_source(record, decoded, store, source, findings) if sound and source is not None else []
    if job is not None:
        check_job(record, decoded, job, findings)
    return _engine_table(record, groups, config or {}, quantization.method) if quantization else [], notes


def _read_config(
    out: Path, config: dict[str, Any] | None, record: Record, findings: Findings
) -> tuple[QuantizationConfig | None, dict[str, ConfigGroup]]:
    """What config.json says of the whole model and of each linear, in whatever layout it names."""
    if config is not None and method_of(config) is not None:
        return read_layout(out, config, record, findings)
    quantization = read_quantization(config, record, findings) if config is not None else None
    return quantization, resolve(quantization, record, findings) if quantization else {}


# --- tensors ------------------------------------------------------------------------------------------------------


def _model_floats(config: Mapping[str, Any], record: Record, findings: Findings) -> tuple[str, ...]:
    """The dtypes allowed for scales in the model's type: what config.json states, and what most plain bytes are."""
    dtypes = set()
    for key in ("torch_dtype", "dtype"):
        config_dtype = config_value(config, key)
        stored_dtype = _DTYPES.get(str(config_dtype).removeprefix("torch."))
        findings.check(
            "config", config_dtype is None or stored_dtype is not None, f"config.json: {key}", f"found {config_dtype!r}"
        )
        dtypes.add(stored_dtype)
    sizes: Counter[str] = Counter()
    for dtype, shape, _ in record.plain.values():
        sizes[dtype] += math.prod(shape) * (4 if dtype == "F32" else 2)
    dtypes |= {dtype for dtype, _ in sizes.most_common(1)}
    return tuple(dtype for dtype in FLOATS if dtype in dtypes) or FLOATS


def _check_linears(
    record: Record,
    groups: Mapping[str, ConfigGroup],
    store: Mapping[str, StoredTensor],
    floats: tuple[str, ...],
    findings: Findings,
) -> dict[str, DecodedLinear]:
    """Presence, dtypes, shapes, values and intended weights of every linear; one linear in memory at a time."""
    decoded: dict[str, DecodedLinear] = {}
    covered = set(record.plain)
    for linear in record.linears.values():
        # A packing that cannot hold what the record says is reported with the config.
        if linear.name not in groups or linear.format != groups[linear.name].weights:
            covered |= {name for name in store if name.rpartition(".")[0] == linear.name}
            continue
        packing = groups[linear.name].packing
        expected = stored_layout(linear, packing, FLOATS if linear.kept else floats)
        covered |= {f"{linear.name}.{suffix}" for suffix in expected}
        tensors = {suffix: store.get(f"{linear.name}.{suffix}") for suffix in expected}
        present = {suffix: stored for suffix, stored in tensors.items() if stored}
        fits = [
            _check_stored(f"{linear.name}.{suffix}", stored, *expected[suffix], findings)
            for suffix, stored in tensors.items()
        ]
        if all(fits):
            decoded[linear.name] = _check_values(linear, present, packing, findings)
    for name in sorted(store):
        fault = "belongs to no linear and is not listed under plain in qkit.json"
        findings.check("coverage", name in covered, f"{store[name].path.name}: {name}", fault)
    return decoded


def _check_stored(
    name: str, stored: StoredTensor | None, dtypes: tuple[str, ...], shape: tuple[int, ...], findings: Findings
) -> bool:
    expected = f"{' or '.join(dtypes)} {list(shape)}"
    if stored is None:
        return findings.check("coverage", False, name, f"{_MISSING}, expected {expected}")
    right = stored.dtype in dtypes and stored.shape == shape
    mismatch = f"found {stored.dtype} {list(stored.shape)}, expected {expected}"
    return findings.check("coverage", right, f"{stored.path.name}: {name}", mismatch)


def _check_values(
    linear: RecordedLinear, tensors: Mapping[str, StoredTensor], packing: str, findings: Findings
) -> DecodedLinear:
    result = decode_stored(linear, tensors, packing)
    faults = dict(result.faults)
    for suffix, stored in tensors.items():
        where = f"{stored.path.name}: {linear.name}.{suffix}"
        findings.check("values", suffix not in faults, where, faults.get(suffix, ""))
    fault = "the decoded weight is not the one that was intended (sha256 in qkit.json)"
    findings.check("weights", result.sha256 == linear.weight_sha256, linear.name, fault)
    return result


def _is_bound(stored: StoredTensor) -> bool:
    """Whether a tensor is a single number that is not NaN: a bound of a clamp, which is infinite where it is open."""
    single = not stored.shape and stored.dtype in ("BF16", "F16", "F32")
    return single and not bool(np.isnan(stored.float32()).any())


def _check_plain(record: Record, store: Mapping[str, StoredTensor], findings: Findings) -> None:
    for name, (dtype, shape, digest) in record.plain.items():
        stored = store.get(name)
        if not _check_stored(name, stored, (dtype,), shape, findings) or stored is None:
            continue
        where = f"{stored.path.name}: {name}"
        findings.check("plain", stored.sha256() == digest, where, "its bytes are not those that were copied (sha256)")
        bad = 0 if _is_bound(stored) else stored.nonfinite()
        findings.check("plain", bad == 0, where, f"holds {bad} values that are NaN or infinite")


def _check_uncovered(
    record: Record, quantization: QuantizationConfig, store: Mapping[str, StoredTensor], findings: Findings
) -> None:
    """Weights left in full precision: those of a block have to be skips of the record, and no group may claim them."""
    for name in record.plain:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or name not in store or len(store[name].shape) != 2:
            continue
        in_block = any(part.isdigit() for part in module.split("."))
        fault = "is a matrix of a block that is neither quantized nor among the skipped of qkit.json"
        findings.check("coverage", not in_block or module in record.skipped, name, fault)
        named = [g.name for g in quantization.groups if g.targets.name(module)]
        claimed = bool(named) and not is_ignored(module, quantization)
        findings.check("config", not claimed, name, f"is stored unquantized and claimed by {', '.join(named)}")
    tied = {first for first, _ in record.tied}
    for module in record.skipped:
        in_plain = module in record.plain or any(name.startswith(f"{module}.") for name in record.plain)
        has_weight = f"{module}.weight" in tied or in_plain
        fault = "qkit.json lists it as skipped, and its weight is neither under plain nor tied"
        findings.check("coverage", has_weight and module not in record.linears, module, fault)


# --- engines ------------------------------------------------------------------------------------------------------


def _engine_table(
    record: Record,
    groups: Mapping[str, ConfigGroup],
    config: Mapping[str, Any],
    method: str,
    on: Deployment = ANYWHERE,
) -> list[EngineRow]:
    parts = {
        name: LinearStorage(linear.format, linear.activations, groups[name].packing, linear.shape, linear.uses)
        for name, linear in record.linears.items()
        if name in groups
    }
    return engine_rows(parts, record.skipped, config, method, record.stock_refusal, on, cache_kind(config))


def engine_table(out: Path, on: Deployment = ANYWHERE) -> list[EngineRow]:
    """The engines that load a packed folder, as its record and config say, without a look at its tensors; nothing where the
    two cannot be read. on: what it is to run on"""
    findings = Findings()
    record, config = read_record(out, findings), read_json(out / "config.json", findings)
    if record is None:
        return []
    quantization, groups = _read_config(out, config, record, findings)
    return [] if quantization is None else _engine_table(record, groups, config or {}, quantization.method, on)


def summary(report: Report) -> str:
    """The first problem and how many there are, in one sentence."""
    first = printable(str(report.problems[0]))
    others = len(report.problems) - 1
    return first + (f" (and {others} more)" if others else "")
