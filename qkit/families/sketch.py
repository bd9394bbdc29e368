"""A checkpoint that has shapes and no numbers, from config.json alone: what ``qkit recommend`` counts before a download."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from qkit.errors import BadCheckpoint, Unsupported
from qkit.families.discover import build_skeleton
from qkit.families.structure import DTYPES
from qkit.files.folder import CONFIG_LIMIT, checked_path, list_names, parse_checked, strip_code_keys
from qkit.files.foreign import foreign_errors
from qkit.files.safefile import read_bytes

CONFIG, PIPELINE, WEIGHTS = "config.json", "model_index.json", "model.safetensors"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")  # that qkit reads
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")  # for which transformers has defaults, of some model
_BESIDE, _LARGEST = (".json", ".jinja", ".model", ".txt"), 64 << 20  # files that a plan may look at, and bytes of one
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def is_config_alone(folder: Path) -> bool:
    """Whether a folder describes a model and has no weights that qkit reads."""
    names = list_names(folder)
    return CONFIG in names and not any(name.endswith(_WEIGHTS) for name in names)


def lacks_config(folder: Path) -> bool:
    """Whether a folder neither describes a model nor has weights of one."""
    names = list_names(folder)
    return not {CONFIG, PIPELINE} & set(names) and not any(name.endswith(_WEIGHTS) for name in names)


@contextmanager
def sketched(folder: Path) -> Iterator[Path]:
    """A folder with the files of ``folder`` and a file of weights that is a hole on the disk, for as long as the context lasts.

    Raises Unsupported for a model that transformers does not have built in, or one that is quantized already, whose tensors its
    config does not tell; BadCheckpoint for a config that describes no model.
    """
    folder = folder.resolve()
    config, _ = strip_code_keys(
        parse_checked(read_bytes(checked_path(folder, CONFIG), CONFIG_LIMIT), f"{folder / CONFIG}")
    )
    if "quantization_config" in config:
        raise Unsupported(
            f"{folder}: no weights, and a config alone does not tell those of a quantized model: get them"
        )
    with TemporaryDirectory(prefix="qkit-") as name:
        target = Path(name) / folder.name
        target.mkdir()
        for file in folder.iterdir():
            if file.suffix in _BESIDE and file.is_file() and file.stat().st_size <= _LARGEST:
                shutil.copy(file, target)
        _write(_tensors(config, folder), target / WEIGHTS)
        yield target


def _tensors(config: Mapping[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that transformers would save of the model, on the meta device; of what is tied, the one that it loads."""
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = build_skeleton(dict(config), str(folder), _dtype(config))
    text_config = model.config.get_text_config(decoder=True)
    stated = {*config, *_text_part(config)}
    for name in _SIZES:
        alias = text_config.attribute_map.get(name, name)
        if hasattr(text_config, name) and not {name, alias} & stated:
            raise BadCheckpoint(
                f"{folder}: {CONFIG} has no {alias}: get the complete file, which says how large the model is"
            )
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point() and _is_saved(model, n)}
    with foreign_errors(f"{folder}: config.json does not tell the tensors of the model", "get the weights"):
        return dict(revert_weight_conversion(model, {**dict(model.named_parameters()), **buffers}))


def _is_saved(model: nn.Module, buffer: str) -> bool:
    parent, _, name = buffer.rpartition(".")
    return name not in model.get_submodule(parent)._non_persistent_buffers_set


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    for part in (config, _text_part(config)):
        named = str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.")
        found = next((dtype for dtype in _NAMES if str(dtype) == f"torch.{named}"), None)
        if found is not None:
            return found
    return torch.bfloat16  # what models are published in


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else {}


def _write(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """A safetensors file of these shapes whose numbers take no disk."""
    header, end = dict[str, Any](), 0
    for name, t in tensors.items():
        start, end = end, end + math.prod(t.shape) * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        os.truncate(f.fileno(), 8 + len(text) + end)
