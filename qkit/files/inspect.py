"""What is in a folder or a file: a model, quantized how and by whom, from headers and configs alone. Imports no torch.

Nothing here raises for what is damaged: it is named in ``Found.damaged``, and the rest is said all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qkit.errors import BadCheckpoint, QkitError
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import CONFIG_LIMIT, PICKLES, PIPELINE_INDEX, RECORD, list_names, load_json, weights_folder
from qkit.files.gguf import GgufHeader, read_gguf
from qkit.files.inspect_config import described_quantization, made_by, word
from qkit.files.rejected import NAME as REJECTED
from qkit.files.rejected import described, read_mark
from qkit.files.safefile import DTYPES, TensorInfo, open_regular, read_header, read_range

T = TypeVar("T")
_SIDE = 64  # files that are listed by name
# What stands beside codes: no weights of their own.
_BESIDE = (
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_shape", "weight_global_scale",
    "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point", "pre_quant_scale", "k_scale", "v_scale",
    "scales", "qzeros", "g_idx", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format",
    "sparse_rows", "sparse_columns", "sparse_values", "low_rank_down", "low_rank_up", "input_smooth", "input_residual",
)  # fmt: skip


@dataclass(kw_only=True)
class Found:
    """What an inspection found.

    kind: what the path is; by_dtype: {dtype: [tensors, bytes]}; weights: elements of the unquantized model, as far as shapes
    tell; bits: bytes of all tensors over these, in bits; side_files: {name: bytes}; rejected: the line of a failed check
    """

    path: str
    kind: str = "folder"
    model_type: str | None = None
    architecture: str | None = None
    quantization: list[str] = field(default_factory=list)
    made_by: str | None = None
    rejected: str | None = None
    weight_files: int = 0
    bytes: int = 0
    tensors: int = 0
    by_dtype: dict[str, list[int]] = field(default_factory=dict)
    weights: int | None = None
    bits: float | None = None
    side_files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return asdict(self)


def inspect(path: Path) -> Found:
    """Looks at a folder, a safetensors file or a GGUF file. Raises BadCheckpoint where there is nothing at all, or neither."""
    found = Found(path=str(path))
    if path.is_dir():
        _look_at_folder(path, found)
    elif path.suffix == ".gguf" or _magic(path) == b"GGUF":
        _look_at_gguf([path], found)
    elif path.suffix == ".safetensors":
        found.kind = "safetensors file"
        header = _try(found, lambda: read_header(path)) or {}
        found.quantization = described_quantization({}, path, header)
        _count(found, header, [path], {}, {})
    elif path.exists():
        raise BadCheckpoint(f"{path}: expected a folder, a safetensors file or a GGUF file")
    else:
        raise BadCheckpoint(f"{path}: there is no such file or folder: check the path")
    return found


def _magic(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return read_range(path, file, 0, 4, "the magic")
    except QkitError:
        return b""


def _try(found: Found, read: Callable[[], T]) -> T | None:
    """What was read, or None and its fault in the list."""
    try:
        return read()
    except QkitError as error:
        text = " ".join(str(error).split())
        if text not in found.damaged:
            found.damaged.append(text)
        return None


def _look_at_folder(folder: Path, found: Found) -> None:
    names = _try(found, lambda: list_names(folder)) or []
    if "job.json" in names and "journal.jsonl" in names:
        found.kind = "job folder of qkit"
        found.notes.append("a run keeps its parts here; the command that made it goes on from them")
    elif "profile.json" in names or "measured.jsonl" in names:
        found.kind = "profile folder of qkit"
    elif PIPELINE_INDEX in names:
        found.kind = "diffusion pipeline"
    elif "adapter_config.json" in names:
        found.kind = "adapter (LoRA): no model by itself"
    mark = read_mark(folder)
    if mark is not None:
        found.rejected = described(mark)
    elif REJECTED in names:
        found.damaged.append(f"{folder / REJECTED}: cannot be read, and says that a check of this model failed")
    model = weights_folder(folder)
    ggufs = [model / n for n in names if n.endswith(".gguf")]
    if ggufs and not any(n.endswith(".safetensors") for n in names):
        _look_at_gguf(ggufs, found)
        return
    inside = names if model == folder else _try(found, lambda: list_names(model)) or []
    shards = [model / n for n in inside if n.endswith(".safetensors")]
    config = _object(found, model / "config.json", "model config", CONFIG_LIMIT) if "config.json" in inside else {}
    record = _object(found, model / RECORD, "record", 1 << 28) if RECORD in inside else {}
    if config or shards:
        found.kind = "model folder" if found.kind == "folder" else found.kind
    _name_model(found, config)
    pickles = [n for n in inside if n.endswith(PICKLES)]
    if pickles:
        found.notes.append(f"{len(pickles)} files that may hold pickles, which are not read: {word(pickles[0])}")
    tensors = _tensors(found, model, shards, bool(config))
    found.quantization = described_quantization(config, model, tensors)
    found.made_by = made_by(config, record, model, set(inside), bool(found.quantization))
    _count(found, tensors, shards, config, record)
    sizes = {n: _size(folder / n) for n in names if not n.endswith((".safetensors", ".gguf"))}
    found.side_files = {n: size for n, size in [*sizes.items()][:_SIDE] if size is not None}
    if len(sizes) > _SIDE:
        found.notes.append(f"{len(sizes) - _SIDE} more files")


def _tensors(found: Found, model: Path, shards: list[Path], is_model: bool) -> dict[str, TensorInfo]:
    """Of all shards that can be read; faults of each, and of what they are together, go to the list."""
    headers = {shard: _try(found, lambda shard=shard: read_header(shard)) for shard in shards}  # type: ignore[misc]
    if is_model and all(header is not None for header in headers.values()):
        _try(found, lambda: Checkpoint.open(model, quantized=True))
    return {name: info for header in headers.values() for name, info in (header or {}).items()}


def _object(found: Found, path: Path, what: str, limit: int) -> dict[str, Any]:
    value = _try(found, lambda: load_json(path, what, limit))
    if value is not None and not isinstance(value, dict):
        found.damaged.append(f"{path}: found a {type(value).__name__}, expected a JSON object")
    return value if isinstance(value, dict) else {}


def _name_model(found: Found, config: Mapping[str, Any]) -> None:
    kind, made = config.get("model_type", config.get("_class_name")), config.get("architectures")
    found.model_type = word(kind) if isinstance(kind, str) else None
    if isinstance(made, list) and made and isinstance(made[0], str):
        found.architecture = word(made[0])


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _count(
    found: Found,
    tensors: Mapping[str, TensorInfo],
    files: list[Path],
    config: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:
    found.weight_files = len(files)
    found.bytes = sum(_size(file) or 0 for file in files)
    found.tensors = len(tensors)
    for info in tensors.values():
        entry = found.by_dtype.setdefault(info.dtype, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + info.nbytes
    if not tensors:
        return
    counts = [_elements(info, tensors, config, record) for info in tensors.values()]
    known = [n for n in counts if n is not None]
    if len(known) < len(counts):
        found.notes.append(f"{len(counts) - len(known)} tensors hold codes of a width that nothing here says")
        return
    found.weights = sum(known)
    found.bits = 8 * sum(info.nbytes for info in tensors.values()) / found.weights if found.weights else None


def _elements(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], record: Mapping[str, Any]
) -> int | None:
    """How many weights of the unquantized model a tensor stands for; None: not known."""
    owner, _, leaf = info.name.rpartition(".")
    stored = math.prod(info.shape)
    if leaf in _BESIDE or ".quant_state." in info.name or (leaf.endswith("_scales") and info.dtype == "U8"):
        return 0
    if leaf == "weight_packed":
        linears = record.get("linears")
        entry = linears.get(owner) if isinstance(linears, Mapping) else None
        shape = entry.get("shape") if isinstance(entry, Mapping) else None
        if isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
            return math.prod(shape)
        if info.dtype == "U8":
            return 2 * stored
        return _stated_shape(tensors.get(f"{owner}.weight_shape"))
    if leaf == "qweight":
        bits = _bits(config)
        return None if bits is None else stored * 8 * DTYPES[info.dtype][1] // bits
    if info.dtype == "U8" and (leaf == "weight" or leaf.endswith("_blocks")):
        return 2 * stored  # two 4-bit codes in a byte (bitsandbytes, ModelOpt, MXFP4 of gpt-oss)
    return stored


def _stated_shape(info: TensorInfo | None) -> int | None:
    """The product of the two numbers that a weight_shape holds."""
    if info is None or info.dtype not in ("I64", "I32") or math.prod(info.shape) != 2:
        return None
    try:
        with open_regular(info.file) as file:
            raw = read_range(info.file, file, info.begin, info.nbytes, "weight_shape")
    except QkitError:
        return None
    half = len(raw) // 2
    sides = [int.from_bytes(part, "little", signed=True) for part in (raw[:half], raw[half:])]
    return math.prod(sides) if all(0 < n < 1 << 40 for n in sides) else None


def _bits(config: Mapping[str, Any]) -> int | None:
    said = config.get("quantization_config")
    said = said if isinstance(said, Mapping) else {}
    bits = next((said[k] for k in ("bits", "w_bit", "num_bits", "weight_bits") if k in said), None)
    return bits if type(bits) is int and 0 < bits <= 32 else None


def _look_at_gguf(files: list[Path], found: Found) -> None:
    found.kind = "GGUF file" if len(files) == 1 else f"{len(files)} GGUF files"
    headers = [h for f in files if (h := _try(found, lambda f=f: read_gguf(f))) is not None]  # type: ignore[misc]
    found.weight_files, found.bytes = len(files), sum(_size(file) or 0 for file in files)
    for header in headers:
        _add_gguf(header, found)
    tensors = [t for h in headers for t in h.tensors]
    if any(t.nbytes is None for t in tensors):
        found.notes.append("some tensors have a type that is not known here: bits per weight are not given")
    elif tensors:
        found.weights = sum(t.count for t in tensors)
        found.bits = 8 * sum(t.nbytes or 0 for t in tensors) / found.weights if found.weights else None


def _add_gguf(header: GgufHeader, found: Found) -> None:
    kind = header.values.get("general.architecture")
    found.model_type = word(kind) if isinstance(kind, str) else found.model_type
    name = header.values.get("general.name")
    if isinstance(name, str):
        found.notes.append(f"it calls itself {word(name)}")
    by = header.values.get("general.quantized_by")
    found.made_by = word(by) if isinstance(by, str) else found.made_by
    found.tensors += len(header.tensors)
    for t in header.tensors:
        entry = found.by_dtype.setdefault(t.dtype, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + (t.nbytes or 0)
    kinds = {t.dtype for t in header.tensors} - {"F32", "F16", "BF16", "F64"}
    line = f"GGUF version {header.version}" + (f", types {', '.join(sorted(kinds))}" if kinds else ", not quantized")
    if line not in found.quantization:
        found.quantization.append(line)
