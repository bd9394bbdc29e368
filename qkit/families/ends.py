"""The two matrices at the ends of a language model: the embeddings, and the output head.

They are found by the model's own functions (``get_input_embeddings``, ``get_output_embeddings``), for every architecture. Both
may be one stored matrix (tied).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from qkit.errors import Unsupported
from qkit.families.structure import ModelStructure

EMBEDDINGS, HEAD = "embeddings", "head"  # the options and the fields of a recipe


@dataclass(frozen=True, kw_only=True)
class End:
    """One of the matrices [vocabulary, width]. name: in the checkpoint, without '.weight'; path: of its module; bias: the head
    adds one; also: paths of further modules with the same matrix, such as the embeddings of an encoder and of its decoder."""

    name: str
    path: str
    shape: tuple[int, int]
    bias: bool = False
    also: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Both ends of a model. tied: the head has no stored matrix and reads that of the embeddings."""

    embeddings: End
    head: End | None
    tied: bool


def ends_of(structure: ModelStructure, option: str) -> Ends:
    """The ends of a model whose matrices can be quantized.

    option: that asks for it, for the message. Raises Unsupported for a model that has none, or whose embeddings or head do more
    than look up a row or multiply.
    """
    where, model = structure.checkpoint.path, structure.model
    if structure.family.streams is not None or structure.family.encodes:
        raise Unsupported(
            f"{where}: {option} is for language models, and this is a {structure.kind_name}: leave it out"
        )
    embeddings, head = find_ends(structure)
    if embeddings is None or not is_lookup(model.get_submodule(embeddings.path)):
        kind = "none" if embeddings is None else type(model.get_submodule(embeddings.path)).__name__
        raise Unsupported(
            f"{where}: {option}: expected embeddings that look up one row for each token, found {kind}: leave it out"
        )
    if head is not None and type(model.get_submodule(head.path)) is not nn.Linear:
        kind = type(model.get_submodule(head.path)).__name__
        raise Unsupported(
            f"{where}: {option}: expected an output head that is a plain linear layer, found {kind}: leave it out"
        )
    other = next((n for n in embeddings.also if not is_lookup(model.get_submodule(n))), None)
    if other is not None:
        raise Unsupported(
            f"{where}: {option}: the embeddings are one matrix with {other}, which does more than look up a row for each "
            "token: leave it out"
        )
    shared = None if head is None else structure.tied.get(f"{head.name}.weight")
    return Ends(embeddings=embeddings, head=head, tied=shared == f"{embeddings.name}.weight")


def find_ends(structure: ModelStructure) -> tuple[End | None, End | None]:
    """The embeddings and the head of a model, whatever they do; None where it has none with a matrix in the file."""
    model = structure.model
    embeddings, head = _end(structure, model, "get_input_embeddings"), _end(structure, model, "get_output_embeddings")
    if embeddings is not None:
        known = (embeddings.path, "" if head is None else head.path)
        also = (n for n in structure.names.sharing(f"{embeddings.path}.weight") if n not in known)
        embeddings = replace(embeddings, also=tuple(also))
    return embeddings, head


def final_norm(structure: ModelStructure) -> str | None:
    """The path of the norm whose output the head reads; None where the family names none of the head's width."""
    path, head = structure.family.final_norm, find_ends(structure)[1]
    module = dict(structure.model.named_modules()).get(path)
    weight = getattr(module, "weight", None)
    fits = head is not None and isinstance(weight, Tensor) and tuple(weight.shape) == head.shape[1:]
    return path if fits else None


def is_lookup(module: nn.Module) -> bool:
    """Whether a module does what ``nn.Embedding`` does; Gemma and others multiply the row by a constant after it."""
    scaled = isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")
    return type(module) is nn.Embedding or (scaled and factor_of(module) is not None)


def factor_of(module: Any) -> tuple[float, bool] | None:
    """The constant that a scaled embedding multiplies its rows by, and whether it is rounded to their dtype first (where it is
    a buffer); None for a plain embedding."""
    factor = getattr(module, "embed_scale", None)
    if isinstance(factor, Tensor):
        known = getattr(module, "scalar_embed_scale", None)  # a buffer without memory has no value
        return None if known is None and factor.is_meta else (float(factor if known is None else known), True)
    return None if factor is None else (float(factor), False)


def _end(structure: ModelStructure, model: Any, function: str) -> End | None:
    """The end that a function of the model gives; None where the model has none, or its matrix is not in the file."""
    try:
        module = getattr(model, function)()
    except (AttributeError, NotImplementedError):  # models without token embeddings
        return None
    path = next((name for name, m in model.named_modules() if m is module), None)
    if path is None or not isinstance(module, (nn.Embedding, nn.Linear)):
        return None
    name = structure.stored_name(path)
    shape = (int(module.weight.shape[0]), int(module.weight.shape[1]))
    stored = any(f"{name}.{s}" in structure.checkpoint.tensors for s in ("weight", "weight_scale"))
    if not stored and f"{name}.weight" not in structure.tied:
        return None
    return End(name=name, path=path, shape=shape, bias=getattr(module, "bias", None) is not None)
