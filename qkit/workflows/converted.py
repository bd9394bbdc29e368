"""What a conversion writes: the tensors of the new layout, config.json and qkit.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from qkit.engine.card import converted_card, write_card
from qkit.engine.export import SHARD_BYTES, module_names, shard_name, spec_bytes, split_shards, without_quantization
from qkit.engine.partial_output import Partial
from qkit.families.discover import kind_of
from qkit.families.structure import ModelStructure, dtype_of
from qkit.files.card import CARD
from qkit.files.folder import RECORD, hub_source
from qkit.files.record import FORMAT_VERSION, to_bytes, write_record
from qkit.files.safefile import DTYPE_NAMES, read_tensor, write_atomic, write_safetensors
from qkit.files.side_files import RECIPE, copy_side_files, file_digest
from qkit.files.sources.packed import PackedFolder
from qkit.kvcache.policy import parse
from qkit.kvcache.scales import FORMATS
from qkit.planning.kept import KEPT
from qkit.system.version import __version__
from qkit.tensor import compressed_tensors as ct
from qkit.tensor.formats import Format
from qkit.tensor.layouts.table import LAYOUTS, cache_name, cache_name_back, stores_zeros, with_zeros
from qkit.verification.fused_layers import fused_groups

PLAIN = "the source holds it in full precision"
Spec = tuple[torch.dtype, tuple[int, ...]]
Pair = tuple[Format, Format | None]


@dataclass(frozen=True)
class Found:
    """What was seen of a linear before anything is written.

    sha256: of the weight that the result has to hold, in float32; scale: dtype of its scales in the result
    difference: the largest relative one between this weight and that of the source; 0 where they are equal bit for bit
    """

    pair: Pair
    shape: tuple[int, int]
    scale: torch.dtype
    sha256: str
    difference: float


def uses(structure: ModelStructure, name: str) -> list[str]:
    """What a matrix outside the blocks is for, "embeddings" or "head"."""
    ends = {"embeddings": structure.family.embeddings, "head": structure.family.head}
    return [use for use, module in ends.items() if module and structure.stored_name(module) == name]


class Target:
    """The tensors and documents of the result."""

    def __init__(
        self,
        packed: PackedFolder,
        structure: ModelStructure,
        found: Mapping[str, Found],
        export: str,
        record: dict[str, Any] | None,
    ) -> None:
        self.packed, self.structure, self.found, self.export, self.record = packed, structure, found, export, record
        self.pairs = {name: f.pair for name, f in found.items()}
        self.zeros, self.model_dtype = stores_zeros(export, self.pairs), dtype_of(packed.checkpoint)
        self.layout = LAYOUTS.get(export)
        self.dtypes = {name: f.scale for name, f in found.items()}
        self.specs: dict[str, Spec] = {name: (i.torch_dtype, i.shape) for name, i in packed.plain.items()}
        self.copied = dict(packed.plain)
        for name, info in packed.cache.items():
            stored = cache_name(cache_name_back(name), export)
            self.copied[stored] = info
            self.specs[stored] = (info.torch_dtype, (1,))
        self.owner: dict[str, str] = {}
        for name, f in found.items():
            for suffix, spec in (self.layout or ct).specs(*f.pair, f.shape, self.dtypes[name]).items():
                self.specs[f"{name}.{suffix}"] = spec
                self.owner[f"{name}.{suffix}"] = name
        self.plain: dict[str, str] = {}
        self._cached: tuple[str, dict[str, Tensor]] = ("", {})

    def load(self, name: str) -> Tensor:
        """One tensor of the result; remembers the sha256 of what no hash of a weight covers."""
        owner = self.owner.get(name)
        if owner is None:
            info = self.copied[name]
            inside = self.packed.checkpoint.tensors.get(name) is info
            tensor = self.packed.checkpoint.read(name) if inside else read_tensor(info)
            tensor = tensor.reshape(self.specs[name][1])
        else:
            tensor = self._tensors(owner)[name[len(owner) + 1 :]]
        if owner is None or name.rpartition(".")[2].startswith("input_"):
            data = tensor.contiguous().reshape(-1).view(torch.uint8)
            self.plain[name] = hashlib.sha256(data.numpy().data).hexdigest()
        return tensor

    def _tensors(self, name: str) -> dict[str, Tensor]:
        if self._cached[0] != name:
            q, static = self.packed.linears[name].read(self.packed.checkpoint)
            stored = with_zeros(q) if self.zeros else q
            dtype, inputs = self.dtypes[name], self.found[name].pair[1]
            if stored.format.scale == "model":
                stored = replace(stored, params=replace(stored.params, scale=stored.params.scale.to(dtype)))
            written = (self.layout or ct).write(stored, inputs, static, dtype)
            self._cached = (name, written)
        return self._cached[1]

    def write(self, partial: Partial, edited: bytes | None) -> None:
        """All files of the result. edited: the card that its card goes on from, in place of that of the source"""
        checkpoint, folder = self.packed.checkpoint, partial.path
        lists = split_shards(self.specs, SHARD_BYTES)
        shards = {shard_name("model", i, len(lists)): names for i, names in enumerate(lists)}
        config = {**checkpoint.config, "quantization_config": self._quantization()}
        documents = {"config.json": config}
        if self.layout is not None:
            config |= self.layout.keys(config)
            documents |= self.layout.files(config["quantization_config"])
        if len(shards) > 1:
            total = sum(spec_bytes(spec) for spec in self.specs.values())
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            documents["model.safetensors.index.json"] = index
        partial.begin(list(dict.fromkeys([*shards, *documents, RECORD, CARD, *self.side_files])))
        hashes = {
            file: write_safetensors(folder / file, [(n, *self.specs[n]) for n in names], self.load)
            for file, names in shards.items()
        }
        files = dict(hashes)
        for name, content in documents.items():
            data = to_bytes(content)
            write_atomic(folder / name, data)
            files[name] = hashlib.sha256(data).hexdigest()
        files |= copy_side_files(checkpoint.path, folder, self.side_files)
        write_card(folder, files, lambda card: converted_card(card, self.export, edited))
        write_record(folder, self._record(hashes) | {"files": files, "config": without_quantization(config)})

    @cached_property
    def side_files(self) -> dict[str, str]:
        """What goes with the model, and the recipe of its weights, which stay."""
        folder = self.packed.checkpoint.path
        recipe = {RECIPE: file_digest(folder, RECIPE)} if (folder / RECIPE).is_file() else {}
        return {**self.packed.checkpoint.side_files, **recipe}

    @property
    def skipped(self) -> dict[str, str]:
        """{layer that is not quantized: reason}"""
        if self.record is not None:
            return dict(self.record["skipped"])
        matrices = [n for n, i in self.packed.plain.items() if n.endswith(".weight") and len(i.shape) > 1]
        names = [n.removesuffix(".weight") for n in matrices if any(part.isdigit() for part in n.split("."))]
        head = self.structure.head
        return dict.fromkeys([*names, *([head] if head is not None and head not in self.found else [])], PLAIN)

    def _quantization(self) -> dict[str, Any]:
        cache, skipped = bool(self.packed.cache), list(self.skipped)
        if self.layout is not None:
            return self.layout.config(self.pairs, skipped, [h for h in (self.structure.head,) if h], cache)
        renamed = {stored: module for stored, module in module_names(self.structure).items() if stored != module}
        ends = tuple(name for name in self.pairs if uses(self.structure, name))
        return ct.config(self.pairs, skipped, renamed, FORMATS["fp"] if cache else None, ends)

    def _record(self, hashes: dict[str, str]) -> dict[str, Any]:
        """qkit.json: that of the source, where it has one, with the new tensors."""
        base = self._foreign_record() if self.record is None else dict(self.record)
        base.pop("sum", None)
        linears = {
            name: {
                **base["linears"].get(name, {}),
                "format": f.pair[0].to_json(),
                "activations": None if f.pair[1] is None else f.pair[1].to_json(),
                "shape": list(f.shape),
                "weight_sha256": f.sha256,
                **({"kept": True} if f.pair[0].scale == "model" and f.scale != self.model_dtype else {}),
            }
            for name, f in self.found.items()
        }
        plain = {
            name: {"dtype": DTYPE_NAMES[str(self.specs[name][0])], "shape": list(self.specs[name][1]), "sha256": digest}
            for name, digest in sorted(self.plain.items())
        }
        before = {"method": self.packed.method, "plan_hash": base["plan_hash"], "export": self.export}
        return {
            **base,
            "format_version": FORMAT_VERSION,
            "qkit_version": __version__,
            "compressed_tensors": version("compressed-tensors"),
            "converted": before,
            "plan_hash": hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest(),
            "linears": linears,
            "skipped": self.skipped,
            "plain": plain,
            "shards": hashes,
        }

    def _foreign_record(self) -> dict[str, Any]:
        """The record of a file of another writer: what can be seen of it."""
        checkpoint = self.packed.checkpoint
        groups = [g for g in fused_groups(self.found) if len({self.pairs[n] for n in g}) == 1]
        torn = len(groups) < len(fused_groups(self.found))
        kept = {"solver": KEPT, "error": None, "baseline_error": None, "fallback": None, "kept": True}
        fingerprint = checkpoint.fingerprint()
        source = {"fingerprint": fingerprint, "sha256": checkpoint.sha256(), **hub_source(checkpoint.path)}
        return {
            "source": {**source, "model_type": kind_of(checkpoint.config), "bytes": checkpoint.nbytes},
            "plan_hash": fingerprint,
            "recipe": {"convert": self.export, "engine": "any" if torn else "default"},
            "seed": 0,
            "transforms": [],
            "calibration": None,
            "linears": {n: {**kept, **({"uses": u} if (u := uses(self.structure, n)) else {})} for n in self.found},
            "fused": groups,
            "tied": [[a, b] for a, b in self.structure.tied.items() if b in checkpoint.tensors],
            **({"kv": parse("fp8").to_json()} if self.packed.cache else {}),
        }
