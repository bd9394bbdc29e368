"""The rules for model folders: which of their files may be read.

Everything lies inside the folder, or in the blobs of the Hugging Face cache that the folder is a
snapshot of. The check is made on real paths, so that neither a name nor a link leads out. Where two sets of
weights lie side by side, neither is picked.
"""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from qkit.errors import BadCheckpoint, IOFailure, Unsupported
from qkit.files.foreign import AGAIN
from qkit.files.safefile import parse_json, read_bytes, shown

WEIGHT_STEMS = ("model", "diffusion_pytorch_model")  # transformers and diffusers
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".7z", ".tar", ".npz", ".joblib")
# The end of a tensor's name that only a quantized checkpoint has, and the method that writes it.
QUANTIZED_NAMES = {
    ".qweight": "gptq or awq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or modelopt",
    ".weight_scale_inv": "fp8",
    ".SCB": "bitsandbytes",
    ".quant_map": "bitsandbytes",
}
# Config keys that choose code to fetch, import or run: the command line is the only place to ask for that.
CODE_KEYS = (
    "trust_remote_code",
    "auto_map",
    "code_revision",
    "custom_generate",
    "custom_pipelines",
    "kernels",
    "use_kernels",
    "kernel_config",
    "kernel_mapping",
    "*attn_implementation*",
    "*experts_implementation*",
)
CONFIG_LIMIT = 16 << 20
INDEX_LIMIT = 100 << 20
RECORD_LIMIT = 1 << 28
SIDE_LIMIT = 1 << 28
_READ = (".json", ".txt", ".jinja", ".model", ".tiktoken")  # ends of files that tokenizers and processors are read from
MAX_DEPTH = 64
MISTRAL = "consolidated"  # begins the names of Mistral's own files: the same weights once more
_SHARD = re.compile(rf"(?!{MISTRAL}).+-\d+-of-\d+\.safetensors")
GGUF_MODEL = "model.gguf"  # the weights of a result in GGUF
RECORD = "qkit.json"  # what every folder that qkit exports has
PIPELINE_INDEX = "model_index.json"  # of a diffusers pipeline
DENOISER = "transformer"  # its component that is quantized


def load_json(path: Path, label: str, limit: int = 1 << 20) -> Any:
    """A JSON file, strictly: see ``parse_json``; also refuses nesting deeper than 64.

    label: what the file is, for messages ("model config"). Raises BadCheckpoint, IOFailure.
    """
    return parse_checked(read_bytes(path, limit), f"{path} ({label})")


def parse_checked(raw: bytes, where: str) -> Any:
    """``parse_json`` with the limit on nesting that ``load_json`` has."""
    value = parse_json(raw, where)
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
        if not level:
            return value
    raise BadCheckpoint(f"{where}: nested more than {MAX_DEPTH} levels deep: get the file again from its source")


def _children(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of qkit.json of a packed folder; None where there is none. Raises BadCheckpoint for a file that is no
    record."""
    file = folder / RECORD
    if not os.path.lexists(file):
        return None
    from qkit.files.schema import RecordFile, validate  # here: the help of commands does not wait for pydantic

    record: dict[str, Any] = validate(
        RecordFile, load_json(file, "record", RECORD_LIMIT), str(file), "run 'qkit verify' on the folder"
    )
    return record


def is_pipeline(folder: Path) -> bool:
    """Whether it is a diffusers pipeline, a folder of components."""
    return (folder / PIPELINE_INDEX).is_file()


def weights_folder(folder: Path) -> Path:
    """Where the config.json and the weights to quantize lie: the folder itself, or a pipeline's transformer."""
    return folder / DENOISER if is_pipeline(folder) else folder


def list_names(folder: Path) -> list[str]:
    """The names in a folder, sorted. Raises IOFailure."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise IOFailure(f"cannot list {folder}: {error.strerror}: check the permissions") from error


def check_side_files(folder: Path) -> None:
    """Raises BadCheckpoint for side files that another library must not open: a pipe, a device, or a file that is far too
    large."""
    for name in list_names(folder):
        file = folder / name
        if file.exists() and not file.is_dir() and not file.is_file():
            raise BadCheckpoint(f"{file}: found a pipe or a device, expected a file: get it again from its source")
        if name.endswith(_READ) and file.is_file() and file.stat().st_size > SIDE_LIMIT:
            raise BadCheckpoint(f"{file}: {file.stat().st_size} bytes, expected at most {SIDE_LIMIT}: {AGAIN}")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the glob patterns fits a name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def strip_code_keys(data: Any) -> tuple[Any, list[str]]:
    """A copy of a JSON value without the keys that choose code (CODE_KEYS), at any depth, and their dotted names."""
    dropped: list[str] = []

    def clean(node: Any, at: str) -> Any:
        if isinstance(node, list):
            return [clean(item, f"{at}{index}.") for index, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        dropped.extend(at + key for key in node if matches(key, CODE_KEYS))
        return {key: clean(item, f"{at}{key}.") for key, item in node.items() if not matches(key, CODE_KEYS)}

    return clean(data, ""), dropped


def snapshot_of(folder: Path) -> Path | None:
    """The folder itself or the one around it that is a snapshot in a Hugging Face cache, if any is."""
    return next((place for place in (folder, *folder.parents) if place.parent.name == "snapshots"), None)


def hub_source(folder: Path) -> dict[str, str]:
    """The repository and the commit (40 hexadecimal digits) of a folder in a Hugging Face cache, as its path has them; else
    nothing."""
    snapshot = snapshot_of(folder)
    if snapshot is None or not re.fullmatch(r"[0-9a-f]{40}", snapshot.name):
        return {}
    kind, *parts = snapshot.parent.parent.name.split("--")
    return {**({"repository": "/".join(parts)} if kind == "models" else {}), "revision": snapshot.name}


def checked_path(folder: Path, name: str, source: str = "the model") -> Path:
    """The path folder / name, after a check that its real path is in the folder or in the blobs of its cache.

    folder: a real path. source: who asks for the file, for messages. Raises BadCheckpoint.
    """
    relative = Path(name)
    if not re.fullmatch(r"[\w.+=@-][\w.+=@/ -]*", name, re.ASCII) or ".." in relative.parts or str(relative) != name:
        raise BadCheckpoint(f"{folder}: {source} names the file {shown(name)}, expected one inside the model folder")
    return listed_path(folder, name, source)


def listed_path(folder: Path, name: str, source: str = "the model") -> Path:
    """The path folder / name, where a listing found that name; its real path is checked as ``checked_path`` does."""
    if not name.isprintable():
        raise BadCheckpoint(f"{folder}: the file {shown(name)} has a name that cannot be printed: rename or remove it")
    try:
        real = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        raise BadCheckpoint(f"{folder / name}: no such file, which {source} needs: get the complete folder") from None
    snapshot = snapshot_of(folder)
    roots = [folder] if snapshot is None else [folder, snapshot.parent.parent / "blobs"]
    if not any(real.is_relative_to(root) for root in roots):
        raise BadCheckpoint(f"{folder / name}: leads out of the model folder, to {real}: copy the file into the folder")
    return folder / name


def refuse_adapter(folder: Path, names: list[str]) -> None:
    """Refuses a folder with what was trained beside a model: it is no model, and would be lost beside one."""
    if name := next((n for n in ("adapter_config.json", "adapter_model.safetensors") if n in names), None):
        raise Unsupported(
            f"{folder}: {name} says that this is an adapter (LoRA), and not a whole model: name the model that it was "
            "trained on with --base of 'qkit quantize', and it is merged into that; or merge it with peft (merge_and_unload)"
        )


def require_safetensors(folder: Path, names: list[str]) -> None:
    """Refuses a folder that holds weights only in a form that qkit does not read."""
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return
    if {GGUF_MODEL, RECORD} <= set(names):  # of qkit's own writing: config.json says what is in it
        return
    if gguf := [name for name in names if name.endswith(".gguf")]:
        refuse_gguf(folder / gguf[0])
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise BadCheckpoint(
            f"{folder}: only {shown(pickles[0])}, which can run code when it is read: convert to safetensors first"
        )
    raise BadCheckpoint(f"{folder}: no weights, expected model.safetensors or model.safetensors.index.json")


def refuse_gguf(file: Path) -> NoReturn:
    """Raises Unsupported for a model in llama.cpp's own format."""
    if (file.parent / RECORD).is_file():
        raise Unsupported(f"{file}: this file is a part of a result of qkit: use its folder, {file.parent}")
    raise Unsupported(
        f"{file}: a model in GGUF, the format of llama.cpp, and qkit reads safetensors: use the original model, or dequantize "
        "this one to safetensors first"
    )


def find_weights(folder: Path, names: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, sorted, and the index's map of tensor names to files (None for a single file)."""
    singles = [name for stem in WEIGHT_STEMS if (name := f"{stem}.safetensors") in names]
    indices = [name for stem in WEIGHT_STEMS if (name := f"{stem}.safetensors.index.json") in names]
    entry_files = singles + indices
    if len(singles) == len(indices) == 1:  # mlx_lm writes an index of a single file, too
        if set(_weight_map(checked_path(folder, indices[0])).values()) == set(singles):
            entry_files = singles
    if len(entry_files) > 1:
        raise BadCheckpoint(
            f"{folder}: ambiguous: {' and '.join(entry_files)} are both there: remove the one that is stale"
        )
    if not entry_files and GGUF_MODEL in names:
        return [checked_path(folder, GGUF_MODEL)], None
    if not entry_files and any(name.startswith(MISTRAL) for name in names):
        raise Unsupported(
            f"{folder}: {MISTRAL}*.safetensors alone, Mistral's own names of tensors: use the folder with model*.safetensors "
            "of the same model"
        )
    if not entry_files:
        raise BadCheckpoint(f"{folder}: no model.safetensors and no model.safetensors.index.json: get the missing file")
    weight_map = _weight_map(checked_path(folder, indices[0])) if indices else None
    listed = sorted(set(weight_map.values())) if weight_map else singles
    stray = [name for name in names if _SHARD.fullmatch(name) and name not in listed]
    if stray:
        raise BadCheckpoint(
            f"{folder}: ambiguous: {shown(stray[0])} is there beside {entry_files[0]}, which does not list it"
        )
    return [checked_path(folder, name, _asker(weight_map, name)) for name in listed], weight_map


def _asker(weight_map: dict[str, str] | None, file: str) -> str:
    tensor = next((name for name, listed in (weight_map or {}).items() if listed == file), None)
    return "the model" if tensor is None else f"the index, for tensor {shown(tensor)},"


def _weight_map(index: Path) -> dict[str, str]:
    data = load_json(index, "index", INDEX_LIMIT)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{index}: no weight_map, expected an object of tensor names and files: get it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise BadCheckpoint(
                f"{index}: weight_map[{shown(name)}] is {shown(file)}, expected a safetensors file name"
            )
    return weight_map
