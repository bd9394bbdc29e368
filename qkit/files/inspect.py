"""The content of a folder or a file: the model, its quantization and the tool that made it, from headers and configs alone.
Imports no torch.

Nothing here raises for what is damaged: it is named in ``Inspection.damaged``, and the rest is said all the same.
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
from qkit.files.inspect_config import describe_quantization, find_quantizer, one_line
from qkit.files.rejected import NAME as REJECTED
from qkit.files.rejected import describe_mark, read_mark
from qkit.files.safefile import DTYPES, TensorInfo, open_regular, read_header, read_range

T = TypeVar("T")
_SIDE = 64  # files that are listed by name
# What stands beside codes: no weights of their own.
_BESIDE = (
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_shape", "weight_global_scale",
    "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point", "pre_quant_scale", "k_scale", "v_scale",
    "k_global_scale", "v_global_scale",
    "scales", "biases", "qzeros", "g_idx", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format",
    "sparse_rows", "sparse_columns", "sparse_values", "low_rank_down", "low_rank_up", "input_smooth", "input_residual",
)  # fmt: skip


@dataclass(kw_only=True)
class Inspection:
    """What a path holds, as far as headers and configs tell.

    kind: what the path is; by_dtype: {dtype: [tensors, bytes]}; weights: elements of the unquantized model, as far as
    shapes tell; bits: bytes of all tensors over these, in bits; side_files: {name: bytes}; rejected: the line of a failed
    check
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
        """All fields as a JSON-able dictionary."""
        return asdict(self)


def inspect(path: Path) -> Inspection:
    """The content of a folder, a safetensors file or a GGUF file. Raises BadCheckpoint where there is nothing, or another
    file."""
    inspection = Inspection(path=str(path))
    if path.is_dir():
        _look_at_folder(path, inspection)
    elif path.suffix == ".gguf" or _magic(path) == b"GGUF":
        _look_at_gguf([path], inspection)
    elif path.suffix == ".safetensors":
        inspection.kind = "safetensors file"
        header = _try(inspection, lambda: read_header(path)) or {}
        inspection.quantization = describe_quantization({}, path, header)
        _count(inspection, header, [path], {}, {})
    elif path.exists():
        raise BadCheckpoint(f"{path}: expected a folder, a safetensors file or a GGUF file")
    else:
        raise BadCheckpoint(f"{path}: there is no such file or folder: check the path")
    return inspection


def _magic(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return read_range(path, file, 0, 4, "the magic")
    except QkitError:
        return b""


def _try(inspection: Inspection, reader: Callable[[], T]) -> T | None:
    """What was read, or None and its fault in the list."""
    try:
        return reader()
    except QkitError as error:
        text = " ".join(str(error).split())
        if text not in inspection.damaged:
            inspection.damaged.append(text)
        return None


def _look_at_folder(folder: Path, inspection: Inspection) -> None:
    names = _try(inspection, lambda: list_names(folder)) or []
    if "job.json" in names and "journal.jsonl" in names:
        inspection.kind = "job folder of qkit"
        inspection.notes.append("a run keeps its parts here; the command that made it goes on from them")
    elif "profile.json" in names or "measured.jsonl" in names:
        inspection.kind = "profile folder of qkit"
    elif PIPELINE_INDEX in names:
        inspection.kind = "diffusion pipeline"
    elif "adapter_config.json" in names:
        inspection.kind = "adapter (LoRA): no model by itself"
    mark = read_mark(folder)
    if mark is not None:
        inspection.rejected = describe_mark(mark)
    elif REJECTED in names:
        inspection.damaged.append(f"{folder / REJECTED}: cannot be read, and says that a check of this model failed")
    model = weights_folder(folder)
    ggufs = [model / n for n in names if n.endswith(".gguf")]
    if ggufs and not any(n.endswith(".safetensors") for n in names):
        _look_at_gguf(ggufs, inspection)
        return
    model_names = names if model == folder else _try(inspection, lambda: list_names(model)) or []
    shards = [model / n for n in model_names if n.endswith(".safetensors")]
    config = (
        _object(inspection, model / "config.json", "model config", CONFIG_LIMIT) if "config.json" in model_names else {}
    )
    record = _object(inspection, model / RECORD, "record", 1 << 28) if RECORD in model_names else {}
    if config or shards:
        inspection.kind = "model folder" if inspection.kind == "folder" else inspection.kind
    _name_model(inspection, config)
    pickles = [n for n in model_names if n.endswith(PICKLES)]
    if pickles:
        inspection.notes.append(
            f"{len(pickles)} files that may hold pickles, which are not read: {one_line(pickles[0])}"
        )
    tensors = _tensors(inspection, model, shards, bool(config))
    inspection.quantization = describe_quantization(config, model, tensors)
    inspection.made_by = find_quantizer(config, record, model, set(model_names), bool(inspection.quantization))
    _count(inspection, tensors, shards, config, record)
    sizes = {n: _size(folder / n) for n in names if not n.endswith((".safetensors", ".gguf"))}
    inspection.side_files = {n: size for n, size in [*sizes.items()][:_SIDE] if size is not None}
    if len(sizes) > _SIDE:
        inspection.notes.append(f"{len(sizes) - _SIDE} more files")


def _tensors(inspection: Inspection, model: Path, shards: list[Path], is_model: bool) -> dict[str, TensorInfo]:
    """Of all shards that can be read; faults of each, and of what they are together, go to the list."""
    headers = {shard: _try(inspection, lambda shard=shard: read_header(shard)) for shard in shards}  # type: ignore[misc]
    if is_model and all(header is not None for header in headers.values()):
        _try(inspection, lambda: Checkpoint.open(model, quantized=True))
    return {name: info for header in headers.values() for name, info in (header or {}).items()}


def _object(inspection: Inspection, path: Path, label: str, limit: int) -> dict[str, Any]:
    value = _try(inspection, lambda: load_json(path, label, limit))
    if value is not None and not isinstance(value, dict):
        inspection.damaged.append(f"{path}: found a {type(value).__name__}, expected a JSON object")
    return value if isinstance(value, dict) else {}


def _name_model(inspection: Inspection, config: Mapping[str, Any]) -> None:
    kind, architectures = config.get("model_type", config.get("_class_name")), config.get("architectures")
    inspection.model_type = one_line(kind) if isinstance(kind, str) else None
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        inspection.architecture = one_line(architectures[0])


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _count(
    inspection: Inspection,
    tensors: Mapping[str, TensorInfo],
    files: list[Path],
    config: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:
    inspection.weight_files = len(files)
    inspection.bytes = sum(_size(file) or 0 for file in files)
    inspection.tensors = len(tensors)
    for info in tensors.values():
        entry = inspection.by_dtype.setdefault(info.dtype, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + info.nbytes
    if not tensors:
        return
    counts = [_elements(info, tensors, config, record) for info in tensors.values()]
    known_counts = [n for n in counts if n is not None]
    if len(known_counts) < len(counts):
        inspection.notes.append(
            f"{len(counts) - len(known_counts)} tensors hold codes of a width that nothing here says"
        )
        return
    inspection.weights = sum(known_counts)
    inspection.bits = (
        8 * sum(info.nbytes for info in tensors.values()) / inspection.weights if inspection.weights else None
    )


def _elements(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], record: Mapping[str, Any]
) -> int | None:
    """How many weights of the unquantized model a tensor stands for; None: not known."""
    owner, _, leaf = info.name.rpartition(".")
    stored = math.prod(info.shape)
    if leaf in _BESIDE or ".quant_state." in info.name or (leaf.endswith("_scales") and info.dtype == "U8"):
        return 0
    if leaf == "weight" and info.dtype == "U32":
        return _words_of_mlx(info, tensors.get(f"{owner}.scales"), config)
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


def _words_of_mlx(info: TensorInfo, scale: TensorInfo | None, config: Mapping[str, Any]) -> int | None:
    """How many weights MLX's words hold: as many as groups have columns."""
    said = config.get("quantization", config.get("quantization_config"))
    entry = said.get(info.name.rpartition(".")[0]) if isinstance(said, Mapping) else None
    setting = entry if isinstance(entry, Mapping) else said
    size = setting.get("group_size") if isinstance(setting, Mapping) else None
    return math.prod(scale.shape) * size if scale is not None and type(size) is int else None


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
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, Mapping) else {}
    bits = next((quantization[k] for k in ("bits", "w_bit", "num_bits", "weight_bits") if k in quantization), None)
    return bits if type(bits) is int and 0 < bits <= 32 else None


def _look_at_gguf(files: list[Path], inspection: Inspection) -> None:
    inspection.kind = "GGUF file" if len(files) == 1 else f"{len(files)} GGUF files"
    headers = [h for f in files if (h := _try(inspection, lambda f=f: read_gguf(f))) is not None]  # type: ignore[misc]
    inspection.weight_files, inspection.bytes = len(files), sum(_size(file) or 0 for file in files)
    for header in headers:
        _add_gguf(header, inspection)
    tensors = [t for h in headers for t in h.tensors]
    if any(t.nbytes is None for t in tensors):
        inspection.notes.append("some tensors have a type that is not known here: bits per weight are not given")
    elif tensors:
        inspection.weights = sum(t.count for t in tensors)
        inspection.bits = 8 * sum(t.nbytes or 0 for t in tensors) / inspection.weights if inspection.weights else None


def _add_gguf(header: GgufHeader, inspection: Inspection) -> None:
    kind = header.values.get("general.architecture")
    inspection.model_type = one_line(kind) if isinstance(kind, str) else inspection.model_type
    name = header.values.get("general.name")
    if isinstance(name, str):
        inspection.notes.append(f"it calls itself {one_line(name)}")
    quantizer = header.values.get("general.quantized_by")
    inspection.made_by = one_line(quantizer) if isinstance(quantizer, str) else inspection.made_by
    inspection.tensors += len(header.tensors)
    for t in header.tensors:
        entry = inspection.by_dtype.setdefault(t.dtype, [0, 0])
        entry[0], entry[1] = entry[0] + 1, entry[1] + (t.nbytes or 0)
    kinds = {t.dtype for t in header.tensors} - {"F32", "F16", "BF16", "F64"}
    line = f"GGUF version {header.version}" + (f", types {', '.join(sorted(kinds))}" if kinds else ", not quantized")
    if line not in inspection.quantization:
        inspection.quantization.append(line)
