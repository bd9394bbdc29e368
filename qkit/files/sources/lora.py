"""A model with an adapter (LoRA) merged into it, weight by weight, when a weight is read.

An adapter of peft is a folder with adapter_config.json and adapter_model.safetensors: two thin matrices A [r, in] and
B [out, r] for each weight that it changes, and some weights in whole. The merged weight is what peft's ``merge_and_unload``
gives on a CPU: (B A) * scaling in float32, rounded to the dtype of the weight, added in that dtype; scaling is alpha / r, or
alpha / sqrt(r) with use_rslora.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.errors import BadCheckpoint, Unsupported
from qkit.files.folder import CONFIG_LIMIT, checked_path, list_names, parse_checked
from qkit.files.safefile import DTYPES, TensorInfo, read_bytes, read_header, shown
from qkit.files.sources.decoded import DecodedInfo, Parts

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|embedding_A|embedding_B)(\.default)?(\.weight)?")
# Fields of adapter_config.json that make an adapter more than B A.
_MORE = (
    "use_dora",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "trainable_token_indices",
)
_BEFORE = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that passed every check that needs no base model.

    config_hash: sha256 of its config; tensors: all that it stores; pairs: {module: (A, B)}; whole: {tensor: replacement}
    """

    folder: Path
    config: Mapping[str, Any]
    config_hash: str
    tensors: dict[str, TensorInfo]
    pairs: dict[str, tuple[TensorInfo, TensorInfo]]
    whole: dict[str, TensorInfo]

    @property
    def file(self) -> Path:
        """The file of its weights."""
        return self.folder / WEIGHTS

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B A for a module."""
        alpha = _for_module(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter and no model."""
    return (folder / CONFIG).is_file() or (folder / WEIGHTS).is_file()


def open_adapter(path: str | Path) -> Adapter:
    """The adapter in a folder; reads config and headers. Raises BadCheckpoint for a damaged one, Unsupported for kinds that
    are no plain LoRA."""
    folder = Path(path).resolve()
    names = list_names(folder)
    if CONFIG not in names:
        raise BadCheckpoint(f"{folder}: no {CONFIG}, expected the folder of an adapter (LoRA): get the complete folder")
    if WEIGHTS not in names:
        raise BadCheckpoint(
            f"{folder}: no {WEIGHTS}: get the complete folder, or save the adapter as safetensors (peft: safe_serialization)"
        )
    raw = read_bytes(checked_path(folder, CONFIG), CONFIG_LIMIT)
    config = parse_checked(raw, f"{folder / CONFIG}")
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{folder / CONFIG}: found a {type(config).__name__}, expected a JSON object")
    _refuse_more(folder, config)
    tensors = read_header(checked_path(folder, WEIGHTS))
    pairs, whole = _sorted_out(folder, tensors)
    digest = hashlib.sha256(raw).hexdigest()
    return Adapter(folder=folder, config=config, config_hash=digest, tensors=tensors, pairs=pairs, whole=whole)


def _refuse_more(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    advice = "merge it into its base model with peft (merge_and_unload), save that, and give the new folder"
    if kind != "LORA":
        raise Unsupported(f"{folder / CONFIG}: peft_type is {shown(kind)}, and qkit merges LORA alone: {advice}")
    more = next((name for name in _MORE if config.get(name)), None)
    if more is not None:
        raise Unsupported(
            f"{folder / CONFIG}: {more} is {shown(config[more])}, and qkit merges plain LoRA alone: {advice}"
        )
    for name in ("lora_alpha", "r"):
        if isinstance(config.get(name, 8), bool) or not isinstance(config.get(name, 8), (int, float)):
            raise BadCheckpoint(
                f"{folder / CONFIG}: {name} is {shown(config[name])}, expected a number: get the file again"
            )


def _sorted_out(folder: Path, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    sides: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        bare = name.replace("_orig_mod.", "").removeprefix(_BEFORE)
        match = _NAME.fullmatch(bare)
        if match is not None:
            sides.setdefault(match["module"], {})[match["side"].removeprefix("embedding_")] = info
        elif "lora_" in bare:
            raise Unsupported(
                f"{info.file}: tensor {shown(name)} is no part of plain LoRA: merge the adapter with peft (merge_and_unload)"
            )
        else:
            whole[bare.replace(".modules_to_save.default", "").replace(".base_layer.", ".")] = info
    pairs = {}
    for module, found in sides.items():
        if found.keys() != {"A", "B"}:
            raise BadCheckpoint(
                f"{folder / WEIGHTS}: {shown(module)} has lora_{next(iter(found))} alone, expected lora_A and lora_B: "
                "get the file again"
            )
        pairs[module] = (found["A"], found["B"])
    if not pairs and not whole:
        raise BadCheckpoint(f"{folder / WEIGHTS}: no weights of an adapter: get the file again")
    return pairs, whole


def _for_module(pattern: Any, module: str, default: Any) -> Any:
    """The value of a pattern that names a module as peft does: the end of its name, or a regular expression for it."""
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        plain = key.lstrip("^")
        if module == plain or module.endswith(f".{plain}"):
            return value
        if any(c in key for c in "\\[(*+?|"):
            raise Unsupported(
                f"alpha_pattern {shown(key)} is a regular expression: merge the adapter with peft (merge_and_unload)"
            )
    return default


# ---- merged into the base ----------------------------------------------------------------------------------------


def merged(adapter: Adapter, base: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of the base with those that the adapter changes as ``DecodedInfo``.

    Raises BadCheckpoint for an adapter of another model: a weight that is not there, or has another shape.
    """
    result = dict(tensors)
    for module, (down, up) in adapter.pairs.items():
        name = _found(adapter, base, tensors, module, ("weight",))
        result[name] = _changed(adapter, base, result[name], module, down, up)
    for stored, info in adapter.whole.items():
        module, _, leaf = stored.rpartition(".")
        name = _found(adapter, base, tensors, module, (leaf,))
        if tensors[name].shape != info.shape:
            _refuse(adapter, base, name, tensors[name].shape, info)
        result[name] = _as_decoded(
            tensors[name], {"whole": info}, partial(_replaced, dtype=tensors[name].dtype), "a whole weight"
        )
    return result


def _found(
    adapter: Adapter, base: Path, tensors: Mapping[str, TensorInfo], module: str, leaves: tuple[str, ...]
) -> str:
    """The name in the base's files of a tensor that the adapter names as the model's class does."""
    bare = module.removeprefix("model.")
    tries = [f"{start}.{leaf}" for leaf in leaves for start in (module, f"model.{module}", bare)]
    name = next((t for t in tries if t in tensors), None)
    if name is None:
        raise BadCheckpoint(
            f"{adapter.folder / WEIGHTS}: the adapter changes {shown(tries[0])}, and {base} has no such tensor: give the "
            f"model that it was trained on{_trained_on(adapter)} as --base"
        )
    return name


def _changed(
    adapter: Adapter, base: Path, info: TensorInfo, module: str, down: TensorInfo, up: TensorInfo
) -> DecodedInfo:
    embedding = "embedding" in down.name
    turned = bool(adapter.config.get("fan_in_fan_out")) != embedding  # an embedding is a table [in, out]
    fits = len(down.shape) == len(up.shape) == 2 and down.shape[0] == up.shape[1]
    delta = (up.shape[0], down.shape[1]) if fits else ()
    if not fits or (delta[::-1] if turned else delta) != info.shape:
        _refuse(adapter, base, info.name, info.shape, up, f"{list(up.shape)} and {list(down.shape)}")
    scaling = adapter.scaling(module, down.shape[0])
    parts = {"base": info, "down": down, "up": up}
    return _as_decoded(info, parts, partial(_merge, scaling=scaling, turned=turned), "LoRA, merged")


def _refuse(
    adapter: Adapter, base: Path, name: str, shape: tuple[int, ...], info: TensorInfo, found: str | None = None
) -> None:
    raise BadCheckpoint(
        f"{adapter.folder / WEIGHTS}: {shown(info.name)} has shape {found or list(info.shape)}, which does not fit "
        f"{shown(name)} of {base}, {list(shape)}: give the model that it was trained on{_trained_on(adapter)} as --base"
    )


def _trained_on(adapter: Adapter) -> str:
    name = adapter.config.get("base_model_name_or_path")
    return f" ({shown(name)})" if isinstance(name, str) and name else ""


def _as_decoded(info: TensorInfo, parts: Mapping[str, TensorInfo], decode: Any, encoding: str) -> DecodedInfo:
    return DecodedInfo(
        name=info.name,
        dtype=info.dtype,
        shape=info.shape,
        file=info.file,
        begin=0,
        end=info.nbytes,
        parts=parts,
        decode=decode,
        encoding=encoding,
        kept="an adapter changes it",
    )


def _merge(parts: Parts, scaling: float, turned: bool) -> Tensor:
    base = parts["base"]
    delta = (parts["up"].float() @ parts["down"].float()) * scaling
    return base + (delta.T if turned else delta).to(base.dtype)


def _replaced(parts: Parts, dtype: str) -> Tensor:
    import torch

    value: Tensor = parts["whole"].to(getattr(torch, DTYPES[dtype][0]))
    return value
