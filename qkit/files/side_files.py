"""What lies beside config and weights of a model and goes with it: tokenizer, templates, licences, settings of other
libraries.

Everything goes, of all subfolders, but for what is named here: weights, which are written anew; code, pickles and archives,
which could run or hide something; hidden files and caches. What goes is read before any work is done, and a plan knows the
sha256 of each file, so that no result can lack one, or have another.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from qkit.errors import BadCheckpoint, write_failure
from qkit.files.folder import PICKLES, RECORD, list_names, listed_path, matches, parse_checked, strip_code_keys
from qkit.files.safefile import open_regular, read_bytes, read_range, sha256_file, shown, sync_dir, write_atomic

WEIGHTS = (
    *(".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".onnx.data", ".msgpack", ".h5", ".hdf5", ".keras"),
    *(".tflite", ".mlmodel", ".ot", ".pb", ".npy", ".nemo", ".engine", ".pdparams", ".pdiparams", ".index.json"),
)
CODE = (
    *(
        ".py",
        ".pyc",
        ".pyo",
        ".pyd",
        ".pyx",
        ".ipynb",
        ".so",
        ".dll",
        ".dylib",
        ".exe",
        ".wasm",
        ".jar",
        ".whl",
        ".egg",
    ),
    *(".sh", ".bat", ".cmd", ".ps1", ".js", ".mjs", ".pl", ".rb", ".lua", ".c", ".cc", ".cpp", ".cu", ".h"),
)
ARCHIVES = (*PICKLES, ".pt2", ".ptl", ".dill", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".rar", ".mar")
KEPT = (".safetensors", ".safetensors.index.json")  # what has weights that go with a model has them in these
STAYS = (*WEIGHTS, *CODE, *ARCHIVES)  # ends of the names, in small letters, of files that do not go with a model
RECIPE = "recipe.yaml"
CACHES = ("__pycache__", "__MACOSX")
# At the top: written for the result, not copied. recipe.yaml, which llm-compressor writes too, and the last four say how the
# source is quantized, which the result is not.
OWN = (
    *("config.json", RECORD, "qkit-rejected.json", RECIPE),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"),
)
# What these map are tokens, and a token may be called 'kernels' or 'auto_map'.
VOCABULARIES = ("tokenizer.json", "*vocab*.json", "added_tokens.json", "tekken.json", "encoder.json", "dict*.json")
# Figures of a training run: no loader reads them, and they may hold NaN, which is no JSON. They are copied as they are.
FIGURES = ("trainer_state.json", "*results.json", "*metrics.json")
# Files that loaders use as a JSON object without a check.
OBJECTS = ("*config.json", "tokenizer.json", "special_tokens_map.json", "chat_template.json")
MODULES = "modules.json"  # of sentence-transformers: the folders of what follows the transformer

MOST_FILES = 2000
MOST_DEPTH = 8
MOST_BYTES = 512 << 20  # of one file; the largest tokenizers have some 50 MB
MOST_TOGETHER = 4 << 30  # of all that are no weights
WHOLE = 1 << 20  # bytes of weights up to which a digest covers all of them
_PAGE, _SAMPLES = 4096, 256


def hash_side_files(
    folder: Path, weight_folders: Collection[str] = (), left_out: Collection[str] = ()
) -> dict[str, str]:
    """{name relative to ``folder``: digest} of every file that goes with the model in ``folder``, a real path.

    weight_folders: subfolders whose weights go too, beside those that modules.json names; left_out: subfolders that are
    left out.
    Raises BadCheckpoint for what leads out of the folder, is no regular file, is too much, or is JSON that cannot be read;
    IOFailure.
    """
    weights = {*weight_folders, *_modules(folder)}
    names = [n for n in _walk(folder, "", left_out, weights) if n not in OWN]
    if len(names) > MOST_FILES:
        raise BadCheckpoint(
            f"{folder}: {len(names)} files beside the weights, expected at most {MOST_FILES}: move what is not part of "
            "the model to another folder"
        )
    size = sum((folder / name).stat().st_size for name in names if not name.endswith(".safetensors"))
    if size > MOST_TOGETHER:
        raise BadCheckpoint(
            f"{folder}: {size} bytes of files beside the weights, expected at most {MOST_TOGETHER}: move what is not part of "
            "the model to another folder"
        )
    return {name: file_digest(folder, name, parse=True) for name in names}


def file_digest(folder: Path, name: str, parse: bool = False) -> str:
    """The sha256 of a file, in hex; of large weights that of samples. parse: whether JSON has to be sound. Raises BadCheckpoint
    as ``hash_side_files``, IOFailure."""
    file = listed_path(folder, name)
    if name.endswith(".safetensors"):
        size = file.stat().st_size
        return sha256_file(file) if size <= WHOLE else sampled_hash(file, 8, size)
    raw = read_bytes(file, MOST_BYTES)
    if parse and name.lower().endswith(".json") and not matches(Path(name).name, FIGURES):
        data = parse_checked(raw, str(file))
        if not isinstance(data, dict) and matches(Path(name).name, OBJECTS):
            raise BadCheckpoint(
                f"{file}: found {shown(data)}, expected a JSON object: get the file again from its source"
            )
    return sha256(raw).hexdigest()


def check_unchanged(folder: Path, digests: Mapping[str, str]) -> None:
    """Raises BadCheckpoint where a file is no longer what it was when the plan was made, or is gone."""
    for name, expected in digests.items():
        if not os.path.lexists(folder / name):
            _refuse(folder, name, "was deleted")
        if file_digest(folder, name) != expected:
            _refuse(folder, name, "was changed")


def _refuse(folder: Path, name: str, change: str) -> None:
    raise BadCheckpoint(
        f"{folder / name}: this file {change} while the model was being quantized: put it back as it was and run the same "
        "command again"
    )


def copy_side_files(folder: Path, out: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """Copy the files of ``digests`` ({name: digest}) to ``out``; {name: sha256} of what has to be there then.

    JSON loses the keys that choose code to run (CODE_KEYS) and is written anew where it has any. Raises BadCheckpoint for a
    file that is not what it was, IOFailure.
    """
    written: dict[str, str] = {}
    check_unchanged(folder, digests)
    for name, expected in digests.items():
        place, target = listed_path(folder, name), out / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                shutil.copyfile(place, target)
                sync_dir(target.parent)
                written[name] = sha256_file(place)
                unchanged = file_digest(folder, name) == expected
            else:
                raw = read_bytes(place, MOST_BYTES)
                data = without_code(name, raw)
                write_atomic(target, data)
                written[name] = sha256(data).hexdigest()
                unchanged = sha256(raw).hexdigest() == expected
        except OSError as e:
            raise write_failure(target, e) from e
        if not unchanged:
            _refuse(folder, name, "was changed")
    return written


def without_code(name: str, raw: bytes) -> bytes:
    """The content of a file, without keys that choose code where it is JSON that has any."""
    cleaned, dropped = _strip_settings(name, raw)
    return (json.dumps(cleaned, indent=2) + "\n").encode() if dropped else raw


def code_keys(folder: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """{name: dotted keys} of what ``without_code`` leaves out of the files of a folder."""
    dropped = {
        n: _strip_settings(n, read_bytes(listed_path(folder, n), MOST_BYTES))[1] for n in names if _is_settings(n)
    }
    return {name: keys for name, keys in dropped.items() if keys}


def _strip_settings(name: str, raw: bytes) -> tuple[Any, list[str]]:
    return strip_code_keys(parse_checked(raw, name)) if _is_settings(name) else (None, [])


def _is_settings(name: str) -> bool:
    """Whether a file is JSON in which keys have the meanings that loaders give them."""
    return name.lower().endswith(".json") and not matches(Path(name).name.lower(), (*VOCABULARIES, *FIGURES))


def unread_files(folder: Path) -> list[str]:
    """Names of files at the top of a model's folder that are neither read nor copied: code, pickles, other weights."""
    names = [n for n in list_names(folder) if not n.startswith(".") and n not in CACHES]
    return [n for n in names if n.lower().endswith(STAYS) and not n.endswith(KEPT)]


def _walk(folder: Path, prefix: str, left_out: Collection[str], weights: Collection[str]) -> list[str]:
    """Names of what goes from ``folder / below``, relative to ``folder``, sorted."""
    if prefix.count("/") > MOST_DEPTH:
        raise BadCheckpoint(f"{folder / prefix}: more than {MOST_DEPTH} folders deep: move it out of the model folder")
    names: list[str] = []
    for leaf in list_names(folder / prefix):
        name, path = f"{prefix}{leaf}", folder / prefix / leaf
        if leaf.startswith(".") or leaf in CACHES:
            continue
        if path.is_dir():
            if path.is_symlink():
                raise BadCheckpoint(
                    f"{path}: found a link to a folder, expected a folder: copy the folder in, or remove it"
                )
            names += [] if name in left_out else _walk(folder, f"{name}/", left_out, weights)
        elif not leaf.lower().endswith(STAYS) or (leaf.endswith(KEPT) and prefix.partition("/")[0] in weights):
            listed_path(folder, name)
            names.append(name)
    return names


def _modules(folder: Path) -> set[str]:
    """The folders that modules.json names, with weights of their own.

    Raises BadCheckpoint where such weights are in a pickle only.
    """
    file = folder / MODULES
    if not file.is_file():
        return set()
    listed: Any = parse_checked(read_bytes(listed_path(folder, MODULES), MOST_BYTES), str(file))
    entries = listed if isinstance(listed, list) else []
    paths = {str(e["path"]).partition("/")[0] for e in entries if isinstance(e, dict) and e.get("path")}
    for path in sorted(p for p in paths if (folder / p).is_dir() and not p.startswith(".")):
        refuse_pickles(folder / path)
    return paths


def refuse_pickles(folder: Path) -> None:
    """Raises BadCheckpoint for a folder whose weights are in a pickle only."""
    names = list_names(folder)
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise BadCheckpoint(
            f"{folder}: only {shown(pickles[0])}, which can run code when it is read: convert it to safetensors"
        )


def sampled_hash(file: Path, start: int, size: int) -> str:
    """sha256 of a shard's header, ``start`` bytes, and of pages spread evenly over the rest."""
    page = min(_PAGE, size - start)
    with open_regular(file) as handle:
        hasher = sha256(read_range(file, handle, 0, start, "the header"))
        for index in range(_SAMPLES):
            at = start + (size - start - page) * index // (_SAMPLES - 1)
            hasher.update(read_range(file, handle, at, page, "the data"))
    return hasher.hexdigest()
