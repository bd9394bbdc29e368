"""A model folder as far as it can be read: what cannot is a finding, and the rest is looked at all the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkit.diagnosis.findings import Findings
from qkit.diagnosis.layers import Layer, count, find_layers, gather
from qkit.errors import QkitError
from qkit.files.folder import CONFIG_LIMIT, INDEX_LIMIT, PICKLES, RECORD, RECORD_LIMIT, list_names, load_json
from qkit.files.safefile import DAMAGED, TensorInfo, read_header, shown
from qkit.files.sources.opening import BESIDE, DECODERS, KEYS, mlx_quantization, without_quantization

AGAIN = "get the file again from its source"
DOWNLOAD = "download the file again, or quantize again"
_MODELOPT = "hf_quant_config.json"
_CODED = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F8_E4M3", "F8_E5M2", "F8_E8M0")
_INDEXES = re.compile(r"(position_ids|_index|_idx|_indices|num_batches_tracked|\.tid2eid)$")
_SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")


@dataclass
class Opened:
    """A folder.

    config: of the model, without what it says of quantization; quantization: that; method: the way of storing, None where
    nothing is quantized
    beside: what a file beside config.json says of the quantization, by the name of the file
    tensors: all headers that could be read; layers: the quantized ones; plain: the other tensors
    complete: whether all files could be read
    """

    folder: Path
    names: list[str]
    config: dict[str, Any]
    quantization: dict[str, Any]
    beside: dict[str, dict[str, Any]]
    record: dict[str, Any]
    method: str | None
    tensors: dict[str, TensorInfo]
    layers: dict[str, Layer] = field(default_factory=dict)
    complete: bool = True

    @property
    def plain(self) -> dict[str, TensorInfo]:
        """The tensors that belong to no quantized layer."""
        used = {info.name for layer in self.layers.values() for info in layer.leaves.values()}
        return {name: info for name, info in self.tensors.items() if name not in used}

    @property
    def strange(self) -> set[str]:
        """Tensors that hold no plain weights and belong to no layer that is known here: codes of another layout."""
        return {n for n, i in self.plain.items() if i.dtype in _CODED and count(i) > 1 and not _INDEXES.search(n)}

    @property
    def text(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def for_any_engine(self) -> bool:
        """Whether qkit's record says that the rules of engines were lifted on purpose."""
        recipe = self.record.get("recipe")
        engine = self.record.get("engine", recipe.get("engine") if isinstance(recipe, dict) else None)
        return engine == "any"


def open_folder(folder: Path, findings: Findings) -> Opened:
    """A folder with everything that can be read of it."""
    names = list_names(folder)
    config = _object(folder / "config.json", CONFIG_LIMIT, findings) if "config.json" in names else {}
    if "config.json" not in names:
        findings.fault(
            "files", "config.json", "the file is not there", "the config of the model", "get the complete folder", 9
        )
    beside = {n: _object(folder / n, CONFIG_LIMIT, findings) for n in BESIDE if n in names}
    quantization = _quantization(config, beside, findings)
    tensors, complete = _tensors(folder, names, findings)
    record = _object(folder / RECORD, RECORD_LIMIT, findings) if RECORD in names else {}
    opened = Opened(
        folder=folder,
        names=names,
        config=without_quantization(config),
        quantization=quantization,
        beside=beside,
        record=record,
        method=None,
        tensors=tensors,
        layers=find_layers(tensors),
        complete=complete,
    )
    if not _is_known(quantization):
        gather(opened.layers, tensors, opened.strange)
    opened.method = _method(opened, findings)
    return opened


def _is_known(quantization: Mapping[str, Any]) -> bool:
    """Whether qkit knows the layout that the config names."""
    named = quantization.get("quant_method")
    return not isinstance(named, str) or named in DECODERS or named in ("auto-round", "qkit")


def _object(path: Path, limit: int, findings: Findings) -> dict[str, Any]:
    try:
        value = load_json(path, "JSON", limit)
    except QkitError as error:
        findings.fault("files", path.name, said(error), "a JSON file that can be read", AGAIN, 9)
        return {}
    if not isinstance(value, dict):
        findings.fault("files", path.name, f"it holds a {type(value).__name__}", "a JSON object", AGAIN, 9)
    return value if isinstance(value, dict) else {}


def said(error: Exception) -> str:
    """An error on one line, without its advice."""
    return " ".join(str(error).split()).removesuffix(f": {AGAIN}")


def _quantization(
    config: Mapping[str, Any], beside: Mapping[str, dict[str, Any]], findings: Findings
) -> dict[str, Any]:
    """What config.json says of the quantization, else a file beside it."""
    if (mlx := mlx_quantization(config)) is not None:
        return mlx
    nodes = [config, *(v for v in config.values() if isinstance(v, dict))]
    found = [node[key] for node in nodes for key in KEYS if node.get(key)]
    if found and not isinstance(found[0], dict):
        findings.fault("config", "config.json", f"quantization_config is {shown(found[0])}", "an object", AGAIN, 8)
        return {}
    if found:
        return dict(found[0])
    for name, content in beside.items():
        inner = content.get("quantization") if name == _MODELOPT else content
        if isinstance(inner, dict):
            return {"quant_method": BESIDE[name], **inner}
    return {}


# ---- weight files ------------------------------------------------------------------------------------------------


def _tensors(folder: Path, names: list[str], findings: Findings) -> tuple[dict[str, TensorInfo], bool]:
    files = [n for n in names if n.endswith(".safetensors")]
    indexes = [n for n in names if n.endswith(".safetensors.index.json")]
    weight_map = _weight_map(folder / indexes[0], findings) if indexes else {}
    if not files and not indexes:
        pickles = [n for n in names if n.endswith(PICKLES)]
        found = f"{pickles[0]} alone, which may run code when it is read" if pickles else "no weight file"
        findings.fault("files", str(folder.name), found, "model.safetensors, or an index and its shards", AGAIN, 9)
        return {}, False
    for name in sorted(set(weight_map.values()) - set(files)):
        lost = [t for t, file in weight_map.items() if file == name]
        findings.fault(
            "files", name, f"the shard is not there: {len(lost)} tensors are lost, first {lost[0]}",
            f"every file that {indexes[0]} lists", "get the missing file", 9,
        )  # fmt: skip
    _check_numbers(files, findings)
    tensors: dict[str, TensorInfo] = {}
    complete = not set(weight_map.values()) - set(files)
    for name in files:
        if weight_map and name not in weight_map.values():
            findings.warn(
                "files", name, f"{indexes[0]} does not list the file, and loaders leave it out",
                "no weight file that the index does not list", "remove the stale file, or add it to the index",
            )  # fmt: skip
            continue
        try:
            header = read_header(folder / name)
        except QkitError as error:
            text = said(error).removeprefix(f"{folder / name}: ").removesuffix(f": {DAMAGED}")
            findings.fault("files", name, text, "a whole safetensors file", DOWNLOAD, 9)
            complete = False
            continue
        _check_twice(name, header, tensors, findings)
        _check_listed(name, header, weight_map, indexes, findings)
        tensors.update(header)
    unread = {t for t, file in weight_map.items() if t not in tensors and file in files}
    if unread and complete:
        findings.fault(
            "files", sorted(unread), f"{indexes[0]} lists the tensor and its shard has not got it",
            "each tensor in the shard that the index names", AGAIN, 8,
        )  # fmt: skip
    return tensors, complete


def _check_numbers(files: list[str], findings: Findings) -> None:
    """Shards whose names count further than the files do."""
    found: dict[tuple[str, int], set[int]] = {}
    for match in map(_SHARD.fullmatch, files):
        if match is not None:
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, total), numbers in found.items():
        first = 0 if 0 in numbers else 1
        missing = sorted(set(range(first, first + min(total, 100_000))) - numbers)
        if missing:
            findings.fault(
                "files", f"{stem}-*-of-{total:05d}.safetensors", f"shards {missing[:8]} are not there",
                f"{total} shards, as their names say", "get the missing files", 9,
            )  # fmt: skip


def _check_twice(
    name: str, header: Mapping[str, TensorInfo], tensors: Mapping[str, TensorInfo], findings: Findings
) -> None:
    twice = [t for t in header if t in tensors]
    if twice:
        findings.fault(
            "files", twice, f"the tensor is in {tensors[twice[0]].file.name} and in {name}", "each tensor once",
            "remove the stale file", 8,
        )  # fmt: skip


def _check_listed(
    name: str,
    header: Mapping[str, TensorInfo],
    weight_map: Mapping[str, str],
    indexes: list[str],
    findings: Findings,
) -> None:
    wrong = [t for t in header if weight_map and weight_map.get(t) != name]
    for tensor in wrong:
        listed = weight_map.get(tensor)
        found = f"the tensor is in {name}, and {indexes[0]} " + (f"says {listed}" if listed else "does not list it")
        findings.fault("files", tensor, found, "the index and the shards agree", "write the index again", 7)


def _weight_map(path: Path, findings: Findings) -> dict[str, str]:
    content = _object(path, INDEX_LIMIT, findings)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        findings.fault("files", path.name, "it has no weight_map", "{tensor: file}", AGAIN, 8)
        return {}
    return found


# ---- the way of storing ------------------------------------------------------------------------------------------


def _method(opened: Opened, findings: Findings) -> str | None:
    """What the config says, else what tensors look like."""
    said_so = opened.quantization.get("quant_method")
    if not isinstance(said_so, str) and opened.quantization:
        said_so = "modelopt" if "quant_algo" in opened.quantization else None
    looks = _looks_like(opened)
    if isinstance(said_so, str):
        if opened.tensors and not opened.layers and not opened.strange and said_so != "gguf":
            findings.fault(
                "config", "config.json", f"it says that the model is quantized ({said_so}), and no tensor is",
                "quantized tensors, or no quantization_config", "get the model again, or take quantization_config out", 9,
            )  # fmt: skip
        return said_so
    if looks is not None:
        findings.fault(
            "config", "config.json", f"{len(opened.layers)} layers are quantized (they look like {looks}), and the config says "
            "nothing of it", "quantization_config", "get the config of this model: no engine loads the file without", 9,
        )  # fmt: skip
    return looks


def _looks_like(opened: Opened) -> str | None:
    leaves = {leaf for layer in opened.layers.values() for leaf in layer.leaves}
    for leaf, method in (
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_2", "modelopt"),
        ("blocks", "mxfp4"),
        ("weight_scale_inv", "fp8"),
    ):
        if leaf in leaves:
            return method
    if "qweight" in leaves:
        layer = next(x for x in opened.layers.values() if "qweight" in x.leaves)
        scale, codes = layer.scale, layer.leaves["qweight"]
        out = scale.shape[-1] if scale is not None else 0
        return "gptq" if codes.shape[-1:] == (out,) else "awq"
    return "fp8" if leaves else None
