"""Packed embeddings and output heads of a checkpoint, put in the place of the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qkit.errors import Unsupported
from qkit.families.ends import EMBEDDINGS, HEAD, End, Ends, ends_of, factor_of, find_ends
from qkit.families.structure import ModelStructure
from qkit.nn.layers import QuantEmbedding, QuantLinear
from qkit.tensor.compressed_tensors import formats_of, read, specs
from qkit.tensor.formats import Format


@dataclass(frozen=True, kw_only=True)
class PackedEnd:
    """A packed matrix [vocabulary, width]. name: in the checkpoint; paths: by use (EMBEDDINGS, HEAD) that of its module, two
    where the ends are tied; also: of further embeddings with this matrix"""

    name: str
    format: Format
    shape: tuple[int, int]
    paths: dict[str, str]
    bias: bool = False
    also: tuple[str, ...] = ()


def packed_ends(structure: ModelStructure, quantization: dict[str, Any] | None, where: str) -> dict[str, PackedEnd]:
    """The packed ends of a checkpoint, by name: those that the config names and whose scales are in the file.

    Raises Unsupported for formats that no lookup or product here can run.
    """
    if quantization is None or structure.family.streams is not None or structure.family.encodes:
        return {}
    names = [e.name for e in find_ends(structure) if e and f"{e.name}.weight_scale" in structure.checkpoint.tensors]
    if not names:  # the usual case, for any model
        return {}
    ends, found = ends_of(structure, "its packed embeddings or head"), formats_of(quantization, names, where)
    return {name: _packed(name, *found[name], ends, where) for name in found}


def _packed(name: str, weights: Format, activations: Format | None, ends: Ends, where: str) -> PackedEnd:
    uses: dict[str, End] = {EMBEDDINGS: ends.embeddings} if name == ends.embeddings.name else {}
    if ends.head is not None and (name == ends.head.name or (uses and ends.tied)):
        uses[HEAD] = ends.head
    looks_up = EMBEDDINGS in uses
    if activations is not None or (looks_up and (weights.kind != "int" or not weights.symmetric)):
        raise Unsupported(
            f"{where}: {name} is stored as {weights}, and qkit runs {'embeddings' if looks_up else 'an output head'} "
            f"{'of integers without zero points' if looks_up else 'whose inputs are not quantized'} alone: load it with "
            "transformers or vLLM"
        )
    end = next(iter(uses.values()))
    paths = {use: e.path for use, e in uses.items()}
    also, bias = ends.embeddings.also if looks_up else (), HEAD in uses and uses[HEAD].bias
    return PackedEnd(name=name, format=weights, shape=end.shape, paths=paths, bias=bias, also=also)


def place_ends(structure: ModelStructure, ends: dict[str, PackedEnd], dtype: torch.dtype) -> None:
    """Put packed modules in the place of embeddings and head; tied ones share their codes."""
    model: nn.Module = structure.model
    for end in ends.values():
        checkpoint = structure.checkpoint
        tensors = {s: checkpoint.read(f"{end.name}.{s}") for s in specs(end.format, None, end.shape, structure.dtype)}
        head = None
        if HEAD in end.paths:
            head = QuantLinear(end.format, None, end.shape, dtype)
            bias = structure.names.name_of(f"{end.paths[HEAD]}.bias")
            head.take({**tensors, **({"bias": checkpoint.read(bias)} if end.bias else {})})
            model.set_submodule(end.paths[HEAD], head)
        if EMBEDDINGS in end.paths:
            table = read(tensors, end.format, end.shape)
            for path in (end.paths[EMBEDDINGS], *end.also):
                old: Any = model.get_submodule(path)
                model.set_submodule(path, QuantEmbedding(table, dtype, head, factor_of(old), old.padding_idx))
