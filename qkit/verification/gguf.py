"""The check of a result in GGUF: every block is decoded, and the weight is the one that was intended.

Part of the independent proof (see ``verify.py``). config.json says under which name, and in which order of rows, the file has
each tensor of the checkpoint; the order is undone before a weight is hashed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qkit.errors import BadCheckpoint
from qkit.verification.decode import CHUNK, StoredTensor
from qkit.verification.files import sha256_of
from qkit.verification.gguf_blocks import Array, decode_blocks
from qkit.verification.gguf_header import GgufFile, read_gguf
from qkit.verification.record import Findings, Record, RecordedLinear, is_shape, is_text

MODEL = "model.gguf"
_PREFIX = "GGUF_"  # of schemes whose names in the file are shorter
# Keys of the file, behind the name of the architecture, and the fields of config.json that they repeat.
_KEYS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "vocab_size": ("vocab_size",),
}
_MOST = 2**32  # rows
_EVERYWHERE = ("block_count", "embedding_length")
_PLAIN = ("llama", "qwen2", "qwen3")


def is_gguf(config: Mapping[str, Any] | None) -> bool:
    """Whether config.json says that the weights are in a GGUF file."""
    quantization = (config or {}).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "gguf"


def check_gguf(out: Path, record: Record | None, config: Mapping[str, Any], findings: Findings) -> None:
    """Compares the file with the record and config.json."""
    path = out / MODEL
    if not findings.check("folder", path.is_file() and not path.is_symlink(), MODEL, "expected a regular file"):
        return
    if record is not None:
        listed = record.shards.get(MODEL)
        findings.check("folder", set(record.shards) == {MODEL}, "qkit.json: shards", f"expected {MODEL} alone")
        fault = "its sha256 is not the one in qkit.json: the file changed after the export"
        findings.check("folder", listed is not None and sha256_of(path) == listed, MODEL, fault)
    try:
        file = read_gguf(path)
    except BadCheckpoint as error:
        where, _, fault = str(error).partition(": ")
        findings.check("folder", False, where, fault)
        return
    _check_keys(file, config, findings)
    if record is not None:
        _check_tensors(file, record, _places(config, file, findings), findings)


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the checkpoint lies: [tensor of the file, rows in it], in the order of its own rows."""

    rows: int
    pieces: list[tuple[str, Array]]


def _places(config: Mapping[str, Any], file: GgufFile, findings: Findings) -> dict[str, _Place]:
    """{tensor of the checkpoint: its place}; every row of the file belongs to one of them at most."""
    given, found = config["quantization_config"].get("tensors"), dict[str, _Place]()
    where = "config.json: quantization_config.tensors"
    if not findings.check("config", isinstance(given, dict), where, "expected an object"):
        return found
    used = {name: np.zeros(math.prod(t.shape[:-1]), dtype=np.int64) for name, t in file.tensors.items()}
    for name, entry in given.items():
        fault = "expected [shape, runs of rows, change, values of a row]"
        if not findings.check("config", _is_place(entry), f"{where}.{name}", fault):
            continue
        shape, runs, change, unit = entry
        if len(shape) != 2 or unit != shape[1] or change != 0:  # its bytes are checked as they are in the file
            continue
        pieces = [(inside, _rows(numbers)) for inside, numbers in runs]
        inside_all = all(i in used and r.min() >= 0 and r.max() < len(used[i]) for i, r in pieces)
        fault = "names rows that are not in the file"
        if findings.check("config", inside_all, f"{where}.{name}", fault):
            found[name] = _Place(sum(len(r) for _, r in pieces), pieces)
            for inside, rows in pieces:
                np.add.at(used[inside], rows, 1)
    for name, counts in used.items():
        findings.check("coverage", bool((counts < 2).all()), f"{MODEL}: {name}", "two tensors have the same row of it")
    return found


def _is_place(entry: Any) -> bool:
    """Whether it is [shape, [[name, [first row, rows, step, ..]], ..], change, unit], with no more rows than a file has."""
    if not (isinstance(entry, list) and len(entry) == 4 and is_shape(entry[0]) and isinstance(entry[1], list)):
        return False
    count = 0
    for run in entry[1]:
        if not (isinstance(run, list) and len(run) == 2 and is_text(run[0]) and isinstance(run[1], list)):
            return False
        whole = all(isinstance(n, int) and not isinstance(n, bool) and abs(n) < _MOST for n in run[1])
        if not run[1] or len(run[1]) % 3 or not whole or min(run[1][1::3]) < 1:
            return False
        count += sum(run[1][1::3])
    return 0 < count < _MOST


def _rows(numbers: list[int]) -> Array:
    runs = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    return np.concatenate([first + step * np.arange(count) for first, count, step in runs])


def _check_keys(file: GgufFile, config: Mapping[str, Any], findings: Findings) -> None:
    architecture = file.keys.get("general.architecture")
    for key, fields in _KEYS.items():
        found = file.keys.get(f"{architecture}.{key}")
        expected = next((config[field] for field in fields if config.get(field) is not None), None)
        if expected is None or (key not in _EVERYWHERE and architecture not in _PLAIN):
            continue  # other architectures have other meanings of these
        if found is None and key == "vocab_size":
            continue  # the list of tokens is as long
        same = found == expected or (isinstance(expected, float) and np.float32(expected) == np.float32(found or 0))
        findings.check(
            "config", bool(same), f"{MODEL}: {architecture}.{key}", f"found {found}, config.json has {expected}"
        )
    tokens = file.keys.get("tokenizer.ggml.tokens")
    right = isinstance(tokens, list) and len(tokens) == config.get("vocab_size")
    findings.check(
        "config", right, f"{MODEL}: tokenizer.ggml.tokens", "is not as long as the vocab_size of config.json"
    )


def _check_tensors(file: GgufFile, record: Record, places: Mapping[str, _Place], findings: Findings) -> None:
    held: dict[str, int] = {}
    for linear in record.linears.values():
        place = places.get(f"{linear.name}.weight")
        if not findings.check("coverage", place is not None, linear.name, "is not in the file") or place is None:
            continue
        kind, rows = linear.type_name.upper().removeprefix(_PREFIX), place.rows
        types = [(file.tensors[name].dtype, file.tensors[name].shape[-1]) for name, _ in place.pieces]
        fault = f"found {types} and {rows} rows, expected {kind} {list(linear.shape)}"
        right = rows == linear.shape[0] and all(found == (kind, linear.shape[1]) for found in types)
        if findings.check("coverage", right, f"{MODEL}: {linear.name}", fault):
            _check_weight(linear, file, place, findings)
            for name, there in place.pieces:
                held[name] = held.get(name, 0) + len(there)
    for name, count in held.items():
        whole = math.prod(file.tensors[name].shape[:-1])
        fault = f"has {whole} rows, and linears of qkit.json have {count} of them"
        findings.check("coverage", count == whole, f"{MODEL}: {name}", fault)
    covered = set(held)
    for name, (dtype, shape, digest) in record.plain.items():
        covered.add(name)
        stored = file.tensors.get(name)
        if not findings.check("coverage", stored is not None, name, "is not in the file") or stored is None:
            continue
        right = stored.dtype == dtype and stored.shape == shape
        fault = f"found {stored.dtype} {list(stored.shape)}, expected {dtype} {list(shape)}"
        if findings.check("coverage", right, f"{MODEL}: {name}", fault):
            fault = "its bytes are not those that were copied (sha256)"
            findings.check("plain", stored.sha256() == digest, f"{MODEL}: {name}", fault)
            bad = stored.nonfinite()
            findings.check("plain", bad == 0, f"{MODEL}: {name}", f"holds {bad} values that are NaN or infinite")
    for name in file.tensors:
        fault = "belongs to no linear and is not listed under plain in qkit.json"
        findings.check("coverage", name in covered, f"{MODEL}: {name}", fault)


def _scale(file: GgufFile, name: str, kind: str) -> float:
    """What all numbers of a tensor are multiplied with; NaN where it should be there and is not."""
    if kind != "NVFP4":
        return 1.0
    stored = file.tensors.get(f"{name.removesuffix('.weight')}.scale")
    return float(stored.array().reshape(-1)[0]) if stored is not None and stored.dtype == "F32" else float("nan")


def _check_weight(linear: RecordedLinear, file: GgufFile, place: _Place, findings: Findings) -> None:
    columns, digest, finite = linear.shape[1], hashlib.sha256(), True
    step = max(1, CHUNK // columns)
    for name, rows in place.pieces:
        stored = file.tensors[name]
        raw = _span(stored, int(rows.min()), int(rows.max()) + 1)
        scale = np.float32(_scale(file, name, stored.dtype))
        for first in range(0, len(rows), step):
            some = raw[rows[first : first + step] - int(rows.min())]
            values = decode_blocks(stored.dtype, some, columns) * scale
            finite &= bool(np.isfinite(values).all())
            digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    findings.check("values", finite, linear.name, "holds values that are NaN or infinite")
    fault = "the decoded weight is not the one that was intended (sha256 in qkit.json)"
    findings.check("weights", digest.hexdigest() == linear.weight_sha256, linear.name, fault)


def _span(stored: StoredTensor, first: int, end: int) -> Array:
    """The bytes of some rows that follow one another."""
    row = stored.size // math.prod(stored.shape[:-1])
    part = replace(stored, start=stored.start + first * row, size=(end - first) * row)
    return np.frombuffer(b"".join(part.chunks()), dtype=np.uint8).reshape(end - first, row)
