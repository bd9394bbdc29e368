"""The check of a result in GGUF: every block is decoded, and the weight is the one that was intended.

Part of the independent proof (see ``verify.py``). config.json says under which name, and in which order of rows, the file has
each tensor of the checkpoint; the order is undone before a weight is hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qkit.errors import BadCheckpoint
from qkit.verification.decode import CHUNK, StoredTensor
from qkit.verification.files import sha256_of
from qkit.verification.gguf_blocks import Array, decode_blocks
from qkit.verification.gguf_header import GgufFile, read_gguf
from qkit.verification.record import Findings, Record, RecordedLinear, is_int, is_text

MODEL = "model.gguf"
_PREFIX = "GGUF_"  # of schemes whose names in the file are shorter
_EXTRA = "rope_freqs.weight"  # computed from the config
# Keys of the file, behind the name of the architecture, and the fields of config.json that they repeat.
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


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
        _check_tensors(file, record, _names(config, findings), findings)


def _names(config: Mapping[str, Any], findings: Findings) -> dict[str, tuple[str, int]]:
    """{tensor of the checkpoint: (its name in the file, heads whose rows are interleaved)}"""
    given, names = config["quantization_config"].get("tensors"), dict[str, tuple[str, int]]()
    where = "config.json: quantization_config.tensors"
    if not findings.check("config", isinstance(given, dict), where, "expected an object"):
        return names
    for name, entry in given.items():
        sound = isinstance(entry, list) and len(entry) == 2 and is_text(entry[0]) and is_int(entry[1])
        if findings.check("config", sound, f"{where}.{name}", "expected [name, heads]"):
            names[name] = (entry[0], entry[1])
    return names


def _check_keys(file: GgufFile, config: Mapping[str, Any], findings: Findings) -> None:
    architecture = file.keys.get("general.architecture")
    for key, field in _KEYS.items():
        found, expected = file.keys.get(f"{architecture}.{key}"), config.get(field)
        expected = (
            config.get("num_attention_heads") if field == "num_key_value_heads" and expected is None else expected
        )
        same = found == expected or (isinstance(expected, float) and np.float32(expected) == np.float32(found or 0))
        findings.check(
            "config", bool(same), f"{MODEL}: {architecture}.{key}", f"found {found}, config.json has {expected}"
        )
    tokens = file.keys.get("tokenizer.ggml.tokens")
    right = isinstance(tokens, list) and len(tokens) == config.get("vocab_size")
    findings.check(
        "config", right, f"{MODEL}: tokenizer.ggml.tokens", "is not as long as the vocab_size of config.json"
    )


def _check_tensors(file: GgufFile, record: Record, names: Mapping[str, tuple[str, int]], findings: Findings) -> None:
    covered = {_EXTRA}
    for linear in record.linears.values():
        name, heads = names.get(f"{linear.name}.weight", ("", 0))
        covered.add(name)
        stored = file.tensors.get(name)
        if not findings.check("coverage", stored is not None, linear.name, "is not in the file") or stored is None:
            continue
        kind = linear.type_name.upper().removeprefix(_PREFIX)
        right = stored.dtype == kind and stored.shape == linear.shape
        fault = f"found {stored.dtype} {list(stored.shape)}, expected {kind} {list(linear.shape)}"
        if findings.check("coverage", right, f"{MODEL}: {name}", fault):
            _check_weight(linear, stored, _scale(file, name, stored.dtype), heads, findings)
    for tensor, (dtype, shape, digest) in record.plain.items():
        name, _ = names.get(tensor, ("", 0))
        covered.add(name)
        stored = file.tensors.get(name)
        if not findings.check("coverage", stored is not None, tensor, "is not in the file") or stored is None:
            continue
        right = stored.dtype == dtype and stored.shape == shape
        fault = f"found {stored.dtype} {list(stored.shape)}, expected {dtype} {list(shape)}"
        if not findings.check("coverage", right, f"{MODEL}: {name}", fault):
            continue
        _check_plain(stored, names[tensor][1], digest, findings, f"{MODEL}: {name}")
    for name in file.tensors:
        fault = "belongs to no linear and is not listed under plain in qkit.json"
        findings.check("coverage", name in covered, f"{MODEL}: {name}", fault)


def _scale(file: GgufFile, name: str, kind: str) -> float:
    """What all numbers of a tensor are multiplied with; NaN where it should be there and is not."""
    if kind != "NVFP4":
        return 1.0
    stored = file.tensors.get(f"{name.removesuffix('.weight')}.scale")
    return float(stored.array().reshape(-1)[0]) if stored is not None and stored.dtype == "F32" else float("nan")


def _check_plain(stored: StoredTensor, heads: int, digest: str, findings: Findings, where: str) -> None:
    rows = _in_order(stored.array().reshape(stored.shape), heads)
    found = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
    findings.check("plain", found == digest, where, "its bytes are not those that were copied (sha256)")
    bad = stored.nonfinite()
    findings.check("plain", bad == 0, where, f"holds {bad} values that are NaN or infinite")


def _check_weight(linear: RecordedLinear, stored: StoredTensor, scale: float, heads: int, findings: Findings) -> None:
    rows, columns = linear.shape
    raw = np.frombuffer(b"".join(stored.chunks()), dtype=np.uint8).reshape(rows, -1)
    if not findings.check(
        "config", heads == 0 or rows % (2 * heads) == 0, linear.name, f"{heads} heads of {rows} rows"
    ):
        return
    raw, digest, finite = _in_order(raw, heads), hashlib.sha256(), True
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        values = decode_blocks(stored.dtype, raw[first : first + step], columns) * np.float32(scale)
        finite &= bool(np.isfinite(values).all())
        digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    findings.check("values", finite, linear.name, "holds values that are NaN or infinite")
    fault = "the decoded weight is not the one that was intended (sha256 in qkit.json)"
    findings.check("weights", digest.hexdigest() == linear.weight_sha256, linear.name, fault)


def _in_order(rows: Array, heads: int) -> Array:
    """Rows as the checkpoint has them: of each head the first halves of all rotations, then the second ones."""
    if not heads:
        return rows
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)
