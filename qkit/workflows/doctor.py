"""The diagnosis of one file or folder: opened, looked at part by part, and put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qkit.diagnosis import cache, compressed, floats, fused, kernels, mlx, sidefiles, values, words
from qkit.diagnosis.compressed import Groups
from qkit.diagnosis.decoding import Decoder, plain
from qkit.diagnosis.drift import Drift
from qkit.diagnosis.expected import Expected, check_mtp, expect, weight_names
from qkit.diagnosis.findings import FAULT, Findings, report_unread
from qkit.diagnosis.layers import Layer, count
from qkit.diagnosis.opened import Opened, open_folder, said
from qkit.diagnosis.recorded import check_layer, check_sums
from qkit.diagnosis.result import Diagnosis
from qkit.diagnosis.targets import check_baseline, note_quantized, weight_files
from qkit.errors import QkitError, Unsupported
from qkit.files.checkpoint import Checkpoint
from qkit.files.inspect_config import find_quantizer
from qkit.files.safefile import TensorInfo
from qkit.files.sources.decoded import CACHE_SCALES
from qkit.workflows.doctor_gguf import diagnose_gguf

Step = Callable[[], object]


def diagnose(path: Path, base: Path | None = None, engine: str | None = None, step: Step = lambda: None) -> Diagnosis:
    """The diagnosis of a model folder, or of a GGUF file. base: the folder of the model that it was made from; engine: the one
    that it is for. Raises BadCheckpoint or Unsupported where there is nothing to look at, or base is another model."""
    path, files = weight_files(path)
    original = Checkpoint.open(base) if base is not None else None
    if files:
        result = diagnose_gguf(path, files, original, engine, step)
    else:
        result = _diagnose_folder(path, original, engine, step)
    if not result.formats and not result.unread and not result.faulty:
        raise Unsupported(f"{path}: nothing in it is quantized: give a quantized model")
    return result


def _diagnose_folder(folder: Path, original: Checkpoint | None, engine: str | None, step: Step) -> Diagnosis:
    findings = Findings()
    opened = open_folder(folder, findings)
    changed = check_sums(folder, opened.record, findings)
    groups = _set_formats(opened, findings)
    if original is not None and opened.tensors:
        check_baseline(_shapes(opened), original, folder)
        note_quantized(original, findings)
    expected = expect(opened, findings) if opened.config and opened.tensors else Expected()
    _check_config(opened, groups, expected, findings)
    check_mtp(opened, findings)
    cache.check_cache(opened, findings)
    fused.check_fused(opened, findings)
    rows = kernels.check_kernels(opened, engine, findings)
    _check_vocabulary(opened, findings)
    sums = opened.record if changed else {}
    unread, drift = _check_values(opened, groups, original, sums, findings, step)
    if original is not None and drift is not None and drift.related:
        sidefiles.compare_side_files(folder, original.path, findings)
        sidefiles.compare_configs(opened.config, original.config, findings)
    result = _put_together(opened, findings, unread, drift)
    result.set_engines(rows, kernels.answer_of(rows, engine))
    result.plain_layers = {
        name: _why_plain(opened, name, groups, expected) for name in weight_names(opened) if name not in unread
    }
    return result


def _shapes(opened: Opened) -> dict[str, tuple[int, ...]]:
    """The weights by their plain names."""
    shapes = {name: info.shape for name, info in opened.plain.items()}
    return shapes | {layer.plain_name: layer.shape for layer in opened.layers.values() if layer.shape is not None}


def _why_plain(opened: Opened, name: str, groups: Groups, expected: Expected) -> str:
    """The reason that the config, or the class of the model, gives for a plain matrix."""
    if name in groups.ignored:
        return "ignore lists it"
    if any(words.names_layer(entry, name) for entry in words.not_converted(opened)):
        return "the list of layers that are not quantized names it"
    if expected.model is not None and name not in expected.linears and ".experts." not in name:
        return "it is no linear layer"
    if opened.method is None:
        return "nothing is quantized"
    return "no target covers it" if name not in groups.of and groups.parsed else "the config gives no reason"


def _set_formats(opened: Opened, findings: Findings) -> Groups:
    """The format of every layer, by the way of storing."""
    method = opened.method
    packing = str(opened.quantization.get("packing_format", ""))
    if method in ("compressed-tensors", "qkit") or "llm_compressor" in packing:
        groups = compressed.read_groups(opened, findings)
        compressed.set_formats(opened, groups, findings)
        return groups
    if method in ("gptq", "awq", "auto-round"):
        words.set_formats(opened, findings)
    elif method in ("fp8", "fbgemm_fp8"):
        floats.set_fp8(opened, findings)
    elif method == "mxfp4":
        floats.set_mxfp4(opened, findings)
    elif method == "modelopt":
        floats.set_modelopt(opened, findings)
    elif method == "mlx":
        mlx.set_formats(opened, findings)
    return Groups()


def _check_config(opened: Opened, groups: Groups, expected: Expected, findings: Findings) -> None:
    if opened.method in ("compressed-tensors", "qkit"):
        compressed.check_plain(opened, groups, expected, findings)
    elif opened.method in ("gptq", "awq", "auto-round"):
        words.check_plain(opened, expected, findings)
    elif opened.method in ("fp8", "fbgemm_fp8", "modelopt"):
        floats.check_plain(opened, expected, findings)
    elif opened.method == "mlx":
        mlx.check_plain(opened, expected, findings)


def _check_vocabulary(opened: Opened, findings: Findings) -> None:
    tables = {
        n: i
        for n, i in opened.plain.items()
        if n.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    }
    tables = {n: i for n, i in tables.items() if "vision" not in n and len(i.shape) == 2}
    rows = min((i.shape[0] for i in tables.values()), default=None)
    said_size = opened.text.get("vocab_size")
    if rows is not None and isinstance(said_size, int) and rows < said_size:
        findings.fault(
            "vocabulary", [*tables], f"the embeddings have {rows} rows", f"{said_size}, the vocab_size of config.json",
            "get the config of this model", 8,
        )  # fmt: skip
    sidefiles.check_side_files(opened.folder, opened.config, rows, findings)


def _check_values(
    opened: Opened,
    groups: Groups,
    original: Checkpoint | None,
    sums: Mapping[str, Any],
    findings: Findings,
    step: Step,
) -> tuple[dict[str, str], Drift | None]:
    """All numbers looked at; what was not, with the reason, and what was compared with the original. sums: the record of qkit,
    where a file of weights is not the one that was written"""
    decoder = Decoder(opened, groups, "F32")
    drift = _drift(original) if original is not None else None
    seen: set[str] = set()
    unread: dict[str, str] = {}
    measured: list[values.Measured] = []
    for layer in opened.layers.values():
        step()
        weight = _check_layer(layer, decoder, measured, findings)
        if isinstance(weight, str):
            unread[layer.name] = weight
            continue
        check_layer(layer.name, weight, sums, findings)
        if drift is not None:
            found = drift.add(layer.plain_name, weight, layer.weights)
            seen.add(layer.plain_name)
            if not found:
                _unmatched(layer.plain_name, weight.shape, original, findings)
    values.compare_sizes(measured, findings)
    for name, info in opened.plain.items():
        step()
        if name in opened.strange:
            unread[name] = f"it is {info.dtype} and of no layout that qkit knows"
            continue
        try:
            if not name.endswith(CACHE_SCALES):
                values.check_plain(name, info, findings)
        except QkitError as error:
            findings.fault("plain tensors", name, said(error), "a tensor that can be read", "get the tensor again", 8)
            unread[name] = "it cannot be read"
            continue
        if drift is not None and not name.endswith(CACHE_SCALES) and info.dtype in ("F32", "F16", "BF16"):
            seen.add(name)
            if not drift.add(name, plain(info), None):
                _unmatched(name, info.shape, original, findings)
    if drift is not None and original is not None:
        drift.unread |= unread.keys()
        drift.report(findings)
        broken = {layer.plain_name for layer in opened.layers.values()}
        if drift.related and not opened.strange:
            _check_lost(opened, original, seen | broken, findings)
    report_unread(unread, len({*opened.layers, *unread}), findings)
    return unread, drift


def _check_layer(layer: Layer, decoder: Decoder, measured: list[values.Measured], findings: Findings) -> Any:
    """All checks of the numbers of one layer; its weight, or why there is none to look at."""
    if decoder.opened.quantization and decoder.refusal is not None:  # its tensors may mean anything
        return decoder.refusal
    try:
        finite = values.check_scales(layer, findings)
        values.check_codes(layer, findings)
        values.check_zeros(layer, findings)
    except QkitError as error:
        findings.fault("scales", layer.name, said(error), "tensors that can be read", "get the file again", 8)
        return "its tensors cannot be read"
    weight = decoder.weight(layer)
    if isinstance(weight, Exception):
        told = any(layer.name in names for (level, *_), (names, _) in findings.entries.items() if level == FAULT)
        if isinstance(weight, Unsupported):
            return said(weight).replace(f"{decoder.opened.folder}: ", "").replace(layer.name, "it")
        if not told:
            text = f"its weight cannot be decoded: {said(weight)}"
            findings.fault("decoding", layer.name, text, "a weight", "quantize again", 7)
        return "its weight cannot be decoded, because of a fault"
    zeros = values.count_zeros(layer)
    if zeros and layer.scale is not None:
        whole = decoder.weight(layer, filled=True)
        leaf, total = layer.scale.name.rpartition(".")[2], count(layer.scale)
        if isinstance(whole, Exception) or not whole.equal(weight):
            values.report_zeros(layer.name, leaf, zeros, total, findings)
        else:
            findings.note("scales", layer.name, f"{zeros} of {total} values of {leaf} are zero, as are their weights")
    found = values.check_weight(layer, weight, findings) if finite else None
    if found is not None:
        measured.append(found)
    return weight


def _drift(original: Checkpoint) -> Drift:
    last: dict[str, Any] = {}

    def read(name: str) -> Any:
        if name not in original.tensors:
            return None
        if name not in last:
            last.clear()
            last[name] = original.read(name)
        return last[name]

    return Drift(read, [n for n, i in original.tensors.items() if len(i.shape) == 2])


def _unmatched(name: str, shape: Any, original: Checkpoint | None, findings: Findings) -> None:
    info: TensorInfo | None = original.tensors.get(name) if original is not None else None
    if info is None:
        findings.note("drift", name, "the baseline has no such tensor")
    else:
        findings.fault(
            "shapes",
            name,
            f"the shape is {list(shape)}",
            f"{list(info.shape)}, as the baseline has it",
            "give the model that the file was made from",
            7,
        )


def _check_lost(opened: Opened, original: Checkpoint, seen: set[str], findings: Findings) -> None:
    lost = [n for n in original.tensors if n not in seen]
    known = {n for (level, kind, *_), (names, _) in findings.entries.items() if kind == "lost tensors" for n in names}
    if opened.text.get("tie_word_embeddings") is not False:
        lost = [n for n in lost if not n.endswith("lm_head.weight")]
    lost = [n for n in lost if n not in known]
    if lost and opened.complete:
        findings.fault(
            "lost tensors", lost, "the baseline has it, and the file has not" if len(lost) == 1 else
            f"the baseline has {len(lost)} tensors more", "all tensors of the original", "quantize again, or copy them", 8,
        )  # fmt: skip


def _put_together(opened: Opened, findings: Findings, unread: dict[str, str], drift: Drift | None) -> Diagnosis:
    result = Diagnosis(path=str(opened.folder), method=opened.method)
    config = {**opened.config, "quantization_config": opened.quantization} if opened.quantization else opened.config
    result.made_by = find_quantizer(config, opened.record, opened.folder, set(opened.names), opened.method is not None)
    for layer in opened.layers.values():
        inputs = f", inputs {layer.activations}" if layer.activations is not None else ""
        left = ", not looked at" if layer.name in unread else ""
        label = f"{layer.weights or 'unknown'}{inputs}, {layer.packing or opened.method}{left}"
        entry = result.formats.setdefault(label, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + layer.nbytes
    found = {name: info for name, info in opened.plain.items() if name not in unread}
    result.plain = [len(found), sum(info.nbytes for info in found.values())]
    result.unread = unread
    result.findings = findings.sorted()
    if drift is not None:
        result.drift = [x.to_json() for x in sorted(drift.layers, key=lambda x: -x.error)]
    return result
