"""The independent proof of a packed checkpoint: everything is read back from disk and nothing is believed.

This program shares no code with the one that writes checkpoints: its own reading of the layouts (``decode``), of the
quantization config (``declared_config``) and of qkit.json (``declared``), on numpy and the safetensors library alone.
A packed checkpoint passes when every linear of the record is there with exactly the tensors its format needs, every
stored number is possible, every decoded weight is, bit for bit, the one that was intended, and the config says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qkit.declared import (
    Findings,
    Linear,
    Problem,
    Record,
    as_object,
    is_hash,
    parse_json,
    printable,
    read_json,
    read_record,
)
from qkit.declared_cache import check_cache
from qkit.declared_config import Declared, Group, is_ignored, read_quantization, resolve
from qkit.declared_fused import check_fused
from qkit.declared_inputs import check_inputs
from qkit.declared_pipeline import check_policy, packed_part
from qkit.decode import FLOATS, Decoded, Stored, decode, file_sha256, layout, read_header
from qkit.engines import EngineRow, Part, engine_rows
from qkit.errors import BadCheckpoint

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # names a loader looks for without an index
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True)
class Report:
    """What ``verify`` found. ``bytes``: of all shards; ``checks``: how many were made under each topic."""

    problems: list[Problem] = field(default_factory=list)
    linears: int = 0
    skipped: int = 0
    bytes: int = 0
    engines: list[EngineRow] = field(default_factory=list)
    checks: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {"ok": self.ok, **asdict(self)}


def verify(out: Path, job: Path | None = None) -> Report:
    """Checks the packed checkpoint in the folder ``out``; with ``job``, also against that job's journal.

    All problems are reported, not only the first; a missing or damaged file is a problem like any other.
    Raises BadCheckpoint when ``out`` is not a folder, or ``job`` holds no journal.
    """
    if not out.is_dir():
        raise BadCheckpoint(f"{out}: not a folder; give the folder that an export wrote")
    findings = Findings()
    if not (out := packed_part(out, findings)).is_dir():
        return Report(findings.problems, checks=dict(findings.checks))
    record, config = read_record(out, findings), read_json(out / "config.json", findings)
    headers = _read_folder(out, record, findings)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if record is None:
        return Report(findings.problems, bytes=size, checks=dict(findings.checks))
    store = {name: stored for tensors in headers.values() for name, stored in tensors.items()}
    declared = read_quantization(config, record, findings) if config is not None else None
    groups = resolve(declared, record, findings) if declared else {}
    decoded = _check_linears(record, groups, store, _model_floats(config or {}, record, findings), findings)
    _check_plain(record, store, findings)
    if declared is not None:
        _check_uncovered(record, declared, store, findings)
    check_fused(record, decoded, findings)
    _check_tied(record, config or {}, store, findings)
    check_cache(record, config or {}, store, findings)
    check_inputs(record, store, findings)
    check_policy(out, record.linears, findings)
    if job is not None:
        _check_job(record, decoded, job, findings)
    engines = _engine_table(record, groups, config or {}, declared.method) if declared else []
    return Report(findings.problems, len(record.linears), len(record.skipped), size, engines, dict(findings.checks))


# --- the folder ---------------------------------------------------------------------------------------------------


def _read_folder(out: Path, record: Record | None, findings: Findings) -> dict[str, dict[str, Stored]]:
    """The tensors of every shard that can be read, after checks of the set of files."""
    headers: dict[str, dict[str, Stored]] = {}
    for path in sorted(out.iterdir()):
        stale = path.suffix in _PICKLES
        findings.check(
            "folder", not stale, path.name, "weights in a pickle format do not belong in a packed checkpoint"
        )
        if path.suffix != ".safetensors":
            continue
        if not findings.check("folder", path.is_file() and not path.is_symlink(), path.name, "expected a regular file"):
            continue
        if record is not None:
            said = record.shards.get(path.name)
            if findings.check("folder", said is not None, path.name, "is not listed in qkit.json; remove it"):
                what = "its sha256 is not the one in qkit.json: the file changed after the export"
                findings.check("folder", file_sha256(path) == said, path.name, what)
        try:
            headers[path.name] = read_header(path)
        except BadCheckpoint as error:
            where, _, what = str(error).partition(": ")
            findings.check("folder", False, where, what)
    for name in record.shards if record else ():
        there = name in headers or (Path(name).name == name and (out / name).is_file())
        findings.check("folder", there, name, "is listed in qkit.json and not in the folder")
    _check_twice(headers, findings)
    _check_index(out, headers, findings)
    return headers


def _check_twice(headers: Mapping[str, Mapping[str, Stored]], findings: Findings) -> None:
    seen: dict[str, str] = {}
    for shard, tensors in headers.items():
        for name in tensors:
            first = seen.setdefault(name, shard)
            findings.check("folder", first == shard, f"{shard}: {name}", f"is also in {first}")


def _check_index(out: Path, headers: Mapping[str, Mapping[str, Stored]], findings: Findings) -> None:
    indexes = sorted(out.glob("*.safetensors.index.json"))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    findings.check("folder", len(files) > 0, out.name, "holds no .safetensors file")
    if not indexes:
        lone = len(files) > 1 or all(name in _SINGLE for name in files)
        findings.check("folder", len(files) <= 1, out.name, f"holds {len(files)} shards and no index")
        findings.check("folder", lone, ", ".join(files), f"loaders look for {' or '.join(_SINGLE)}")
        return
    findings.check("folder", len(indexes) == 1, out.name, f"holds {len(indexes)} index files, expected one")
    for path in indexes:
        data = read_json(path, findings)
        if data is None:
            continue
        metadata = data.get("metadata")
        weights = as_object(data.get("weight_map"), "folder", f"{path.name}: weight_map", findings)
        if weights is None:
            continue
        there = {name: shard for shard, tensors in headers.items() for name in tensors}
        for name in sorted({*there, *weights}):
            what = f"the index says {weights.get(name)!r}, the shards say {there.get(name)!r}"
            findings.check("folder", there.get(name) == weights.get(name), f"{path.name}: {name}", what)
        for name in files:
            findings.check("folder", name in weights.values(), name, f"is not listed in {path.name}; remove it")
        size = sum(stored.size for tensors in headers.values() for stored in tensors.values())
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        what = f"says {said}, the tensors take {size} bytes"
        findings.check("folder", said == size, f"{path.name}: metadata.total_size", what)


# --- tensors ------------------------------------------------------------------------------------------------------


def _model_floats(config: Mapping[str, Any], record: Record, findings: Findings) -> tuple[str, ...]:
    """The dtypes allowed for scales in the model's type: what config.json states, and what most plain bytes are."""
    stated = set()
    for key in ("torch_dtype", "dtype"):
        said = _config_value(config, key)
        known = _DTYPES.get(str(said).removeprefix("torch."))
        findings.check("config", said is None or known is not None, f"config.json: {key}", f"found {said!r}")
        stated.add(known)
    sizes: Counter[str] = Counter()
    for dtype, shape, _ in record.plain.values():
        sizes[dtype] += math.prod(shape) * (4 if dtype == "F32" else 2)
    stated |= {dtype for dtype, _ in sizes.most_common(1)}
    return tuple(dtype for dtype in FLOATS if dtype in stated) or FLOATS


def _config_value(config: Mapping[str, Any], key: str) -> Any:
    """A field of config.json, from the top or from the part that describes the language model."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)


def _check_linears(
    record: Record,
    groups: Mapping[str, Group],
    store: Mapping[str, Stored],
    floats: tuple[str, ...],
    findings: Findings,
) -> dict[str, Decoded]:
    """Presence, dtypes, shapes, values and intended weights of every linear; one linear in memory at a time."""
    decoded: dict[str, Decoded] = {}
    known = set(record.plain)
    for linear in record.linears.values():
        # A packing that cannot hold what the record says is reported with the config.
        if linear.name not in groups or linear.format != groups[linear.name].weights:
            known |= {name for name in store if name.rpartition(".")[0] == linear.name}
            continue
        expected = layout(linear, groups[linear.name].packing, floats)
        known |= {f"{linear.name}.{suffix}" for suffix in expected}
        tensors = {suffix: store.get(f"{linear.name}.{suffix}") for suffix in expected}
        present = {suffix: stored for suffix, stored in tensors.items() if stored}
        fits = [
            _check_stored(f"{linear.name}.{suffix}", stored, *expected[suffix], findings)
            for suffix, stored in tensors.items()
        ]
        if all(fits):
            decoded[linear.name] = _check_values(linear, present, findings)
    for name in sorted(store):
        what = "belongs to no linear and is not listed under plain in qkit.json"
        findings.check("coverage", name in known, f"{store[name].path.name}: {name}", what)
    return decoded


def _check_stored(
    name: str, stored: Stored | None, dtypes: tuple[str, ...], shape: tuple[int, ...], findings: Findings
) -> bool:
    wanted = f"{' or '.join(dtypes)} {list(shape)}"
    if stored is None:
        return findings.check("coverage", False, name, f"is missing, expected {wanted}")
    right = stored.dtype in dtypes and stored.shape == shape
    found = f"found {stored.dtype} {list(stored.shape)}, expected {wanted}"
    return findings.check("coverage", right, f"{stored.path.name}: {name}", found)


def _check_values(linear: Linear, tensors: Mapping[str, Stored], findings: Findings) -> Decoded:
    done = decode(linear, tensors)
    faults = dict(done.faults)
    for suffix, stored in tensors.items():
        where = f"{stored.path.name}: {linear.name}.{suffix}"
        findings.check("values", suffix not in faults, where, faults.get(suffix, ""))
    what = "the decoded weight is not the one that was intended (sha256 in qkit.json)"
    findings.check("weights", done.sha256 == linear.weight_sha256, linear.name, what)
    return done


def _check_plain(record: Record, store: Mapping[str, Stored], findings: Findings) -> None:
    for name, (dtype, shape, digest) in record.plain.items():
        stored = store.get(name)
        if not _check_stored(name, stored, (dtype,), shape, findings) or stored is None:
            continue
        where = f"{stored.path.name}: {name}"
        findings.check("plain", stored.sha256() == digest, where, "its bytes are not those that were copied (sha256)")
        bad = stored.nonfinite()
        findings.check("plain", bad == 0, where, f"holds {bad} values that are NaN or infinite")


def _check_uncovered(record: Record, declared: Declared, store: Mapping[str, Stored], findings: Findings) -> None:
    """Weights left in full precision: those of a block have to be skips of the record, and no group may claim them."""
    for name in record.plain:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or name not in store or len(store[name].shape) != 2:
            continue
        in_block = any(part.isdigit() for part in module.split("."))
        what = "is a matrix of a block that is neither quantized nor among the skipped of qkit.json"
        findings.check("coverage", not in_block or module in record.skipped, name, what)
        named = [g.name for g in declared.groups if g.targets.name(module)]
        claimed = bool(named) and not is_ignored(module, declared)
        findings.check("config", not claimed, name, f"is stored unquantized and claimed by {', '.join(named)}")
    tied = {first for first, _ in record.tied}
    for module in record.skipped:
        kept = f"{module}.weight" in tied or any(name.startswith(f"{module}.") for name in record.plain)
        what = "qkit.json lists it as skipped, and its weight is neither under plain nor tied"
        findings.check("coverage", kept and module not in record.linears, module, what)


# --- relations ----------------------------------------------------------------------------------------------------


def _check_tied(record: Record, config: Mapping[str, Any], store: Mapping[str, Stored], findings: Findings) -> None:
    for first, second in record.tied:
        findings.check("tied", first not in store, first, f"is stored although it is tied to {second}")
        findings.check("tied", second in store, second, f"is missing although {first} is tied to it")
    said = _config_value(config, "tie_word_embeddings")
    head = any(first.endswith("lm_head.weight") for first, _ in record.tied)
    where = "config.json: tie_word_embeddings"
    findings.check("tied", said in (None, True, False), where, f"found {said!r}, expected true or false")
    findings.check("tied", not (head and said is False), where, "false, and qkit.json ties the output head")
    stored = any(name.endswith("lm_head.weight") for name in store)
    findings.check("tied", not (said is True and stored), where, "true, and an output head is stored")
    names = config.get("architectures")
    causal = isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)
    what = "the output head is neither stored, nor quantized, nor tied in qkit.json"
    quantized = any(name.endswith("lm_head") for name in record.linears)
    findings.check("tied", stored or head or quantized or not (causal and said is True), where, what)
    kind = config.get("model_type")
    agree = kind in (None, record.model_type) or names == [record.model_type]
    findings.check("config", agree, "config.json: model_type", f"{kind!r}, and qkit.json says '{record.model_type}'")


def _check_job(record: Record, decoded: Mapping[str, Decoded], job: Path, findings: Findings) -> None:
    """The decoded weights against the journal of the job: the last committed line about a linear counts."""
    path = job / "journal.jsonl"
    if not path.is_file():
        raise BadCheckpoint(f"{path}: no such journal; give the folder of the job that made the checkpoint")
    intended: dict[str, str] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was never committed
        try:
            entry = parse_json(line)
            linears = entry.get("linears", {})
            found = {name: linear["weight_sha256"] for name, linear in linears.items()}
        except (ValueError, AttributeError, KeyError, TypeError):
            findings.check("job", False, f"journal.jsonl: line {number}", "is damaged")
            continue
        findings.check("job", all(map(is_hash, found.values())), f"journal.jsonl: line {number}", "a hash is malformed")
        intended.update(found)
    for name in sorted({*intended, *record.linears}):
        both = name in intended and name in record.linears
        where = "qkit.json" if name in intended else "journal.jsonl"
        if findings.check("job", both, name, f"is in only one of the checkpoint and the job: missing from {where}"):
            done = decoded[name].sha256 if name in decoded else None
            what = "the decoded weight is not the one that the job committed (sha256)"
            findings.check("job", done == intended[name], name, what)


# --- engines ------------------------------------------------------------------------------------------------------


def _engine_table(
    record: Record, groups: Mapping[str, Group], config: Mapping[str, Any], method: str
) -> list[EngineRow]:
    parts = {
        name: Part(linear.format, linear.activations, groups[name].packing, linear.shape)
        for name, linear in record.linears.items()
        if name in groups
    }
    return engine_rows(parts, record.skipped, config, method)


def summary(report: Report) -> str:
    """The first problem and how many there are, in one sentence."""
    first = printable(str(report.problems[0]))
    more = len(report.problems) - 1
    return first + (f" (and {more} more)" if more else "")
