"""The diagnosis of GGUF files: header, blocks, the config beside them, and the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qkit.diagnosis import sidefiles
from qkit.diagnosis.drift import Drift
from qkit.diagnosis.findings import Findings, report_unread
from qkit.diagnosis.gguf import PLAIN, check_places, check_values, in_order, names_in, open_gguf
from qkit.diagnosis.gguf_keys import check_keys, number_of
from qkit.diagnosis.kernels import answer_of, check_gguf_kernels
from qkit.diagnosis.recorded import check_sums
from qkit.diagnosis.result import Diagnosis
from qkit.diagnosis.targets import check_baseline, note_quantized
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import GGUF_MODEL, RECORD
from qkit.files.gguf import GgufHeader, GgufTensor
from qkit.files.inspect_config import one_line

# Keys of the file, behind the name of the architecture, and the fields of config.json that say the same.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "expert_count": "num_local_experts",
}


def diagnose_gguf(
    path: Path, files: list[Path], original: Checkpoint | None, engine: str | None, step: Callable[[], object]
) -> Diagnosis:
    """The diagnosis of the GGUF files of a folder, or of one."""
    findings, result = Findings(), Diagnosis(path=str(path), kind="GGUF", method="gguf")
    headers = open_gguf(files, findings)
    folder = path if path.is_dir() else path.parent
    if {file.name for file in files} == {GGUF_MODEL}:
        check_sums(folder, sidefiles.read_object(folder, RECORD, findings) or {}, findings)
    names = _names(original, headers, path, findings) if original is not None else None
    parts = {h.values.get("split.no") for _, h in headers if "split.count" in h.values}
    for file, header in headers:
        check_places(file, header, findings)
        if parts and header.values.get("split.no") != 0:
            continue
        whole = header if not parts else _joined(header, [h for _, h in headers])
        check_keys(whole, findings)
        beside = sidefiles.read_object(folder, "config.json", findings)
        _compare_config(whole, beside, "config.json", findings)
    related = True
    for file, header in headers:
        drift, name_of = _drift(header, original, names)
        result.unread |= check_values(file, header, drift, name_of, findings, step)
        if drift is not None and original is not None and names is not None and drift.layers:
            drift.report(findings)
            related &= drift.related
            result.drift += [x.to_json() for x in drift.layers]
            if drift.related:
                _check_lost(original, names, header, findings)
        _count(header, result)
    for _, header in headers if original is not None and related else ():
        _compare_config(header, original.config if original else None, "the baseline", findings)
        if header.values.get("split.no", 0) == 0:
            _compare_template(header, original.path if original else None, findings)
    types = {t.name: t.dtype for _, h in headers for t in h.tensors if t.dtype not in PLAIN}
    report_unread(result.unread, len(types), findings)
    rows = check_gguf_kernels(types, engine, findings)
    result.set_engines(rows, answer_of(rows, engine))
    result.drift.sort(key=lambda line: -line["error"])
    result.findings = findings.sorted()
    return result


def _names(
    original: Checkpoint, headers: list[tuple[Path, GgufHeader]], path: Path, findings: Findings
) -> dict[str, tuple[str, int]] | None:
    """What the tensors of all files are called in the original; None where that is not known."""
    found: dict[str, tuple[str, int]] = {}
    for _, header in headers:
        names = names_in(original, header)
        if names is None:
            findings.warn(
                "drift", "baseline", "weights were not compared: names of this model need the library gguf", "the library gguf",
                "pip install gguf", 3,
            )  # fmt: skip
            return None
        found |= names
    if headers:
        shapes = {t.name: t.shape[::-1] for _, h in headers for t in h.tensors}
        check_baseline({found[name][0]: shape for name, shape in shapes.items() if name in found}, original, path)
        note_quantized(original, findings)
    return found


def _joined(first: GgufHeader, all_headers: list[GgufHeader]) -> GgufHeader:
    """The header of a model in several files."""
    return GgufHeader(first.version, first.values, tuple(t for h in all_headers for t in h.tensors), first.lengths)


def _count(header: GgufHeader, result: Diagnosis) -> None:
    maker = header.values.get("general.quantized_by")
    result.made_by = one_line(maker) if isinstance(maker, str) else result.made_by
    for t in header.tensors:
        if t.dtype in PLAIN and t.name not in result.unread:
            result.plain = [result.plain[0] + 1, result.plain[1] + (t.nbytes or 0)]
            if len(t.shape) > 1:
                result.plain_layers[t.name] = f"stored as {t.dtype}"
            continue
        label = f"{t.dtype}, not looked at" if t.name in result.unread else t.dtype
        entry = result.formats.setdefault(label, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + (t.nbytes or 0)


def _compare_config(header: GgufHeader, config: Mapping[str, Any] | None, where: str, findings: Findings) -> None:
    """The sizes in the file against a config.json."""
    name = header.values.get("general.architecture")
    for key, field in _FIELDS.items():
        found, wanted = number_of(header.values, f"{name}.{key}"), (config or {}).get(field)
        if found is not None and isinstance(wanted, int) and found != wanted:
            findings.fault(
                "config", f"{name}.{key}", f"{found}, and {where} says {wanted} ({field})", "the same number",
                "convert the model again", 7,
            )  # fmt: skip


def _compare_template(header: GgufHeader, base: Path | None, findings: Findings) -> None:
    theirs = sidefiles.chat_template(base) if base is not None else None
    mine = header.values.get("tokenizer.chat_template")
    if theirs is not None and mine is None:
        findings.fault(
            "chat template", "tokenizer.chat_template", "there is none, and the original has one", "that of the original",
            "convert the model again", 6,
        )  # fmt: skip
    elif theirs is not None and isinstance(mine, str) and mine.strip() != theirs.strip():
        findings.warn(
            "chat template", "tokenizer.chat_template", "it is not that of the original", "the template of the original",
            "convert the model again", 5,
        )  # fmt: skip


def _drift(
    header: GgufHeader, original: Checkpoint | None, names: dict[str, tuple[str, int]] | None
) -> tuple[Drift | None, Any]:
    """What compares the tensors with the original, and gives their names and rows there."""
    known = names or {}

    def name_of(t: GgufTensor, rows: Any) -> tuple[str, Any]:
        name, heads = known.get(t.name, (t.name, 0))
        shaped = rows.reshape(t.shape[::-1])
        return name, in_order(shaped, heads)

    if original is None or not known:
        return None, name_of
    source = original

    def read(name: str) -> Any:
        return source.read(name) if name in source.tensors else None

    return Drift(read, [n for n, i in source.tensors.items() if len(i.shape) == 2]), name_of


def _check_lost(
    original: Checkpoint, known: dict[str, tuple[str, int]], header: GgufHeader, findings: Findings
) -> None:
    there = {t.name for t in header.tensors}
    lost = [n for n in original.tensors if n not in {name for name, _ in known.values()}]
    lost += [name for stored, (name, _) in known.items() if stored not in there and not stored.startswith("output.")]
    lost = [n for n in lost if "rotary_emb" not in n and not n.endswith("lm_head.weight")]
    if lost and "split.count" not in header.values:
        findings.fault(
            "lost tensors", lost, f"the baseline has {len(lost)} tensors that the file has not", "all tensors of the original",
            "convert the model again", 8,
        )  # fmt: skip
