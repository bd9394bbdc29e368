"""The rules of results in GGUF: when a recipe asks for one, what cannot be in it, and the types of its ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from qkit.errors import Unsupported, UsageError
from qkit.families.ends import EMBEDDINGS, HEAD
from qkit.families.structure import ModelStructure
from qkit.files.gguf_container import Container, FileTensor
from qkit.files.gguf_converter import WHAT
from qkit.files.gguf_places import SCALE
from qkit.files.gguf_size import file_bytes, file_keys
from qkit.planning.recipe import SOURCE, Recipe, parse_end
from qkit.planning.sizes import plain_bytes
from qkit.tensor.formats import GGUF_FORMATS, fit_gguf, scheme
from qkit.tensor.gguf_blocks import aligned, block_bytes
from qkit.transforms.table import TRANSFORMS

if TYPE_CHECKING:
    from qkit.planning.linear_plan import LinearPlan

TURNED = "llama.cpp has it turned round, or with other values, so that its rows cannot be blocks"
GGUF = "gguf"  # as a method of export
NVFP4 = "gguf_nvfp4"
_SCALED = ("llama", "qwen3")  # architectures of which llama.cpp multiplies every product with the scale of its tensor
ODD_WIDTH = "its {} input columns are not a multiple of 32, which every type of GGUF needs"


def asks_for_gguf(recipe: Recipe) -> bool:
    """Whether the result is a GGUF file."""
    return scheme(recipe.scheme).weights.gguf


def check_gguf(
    recipe: Recipe, structure: ModelStructure, transforms: tuple[str, ...], kv: dict[str, Any] | None
) -> None:
    """Raises UsageError for what cannot go into a GGUF file, Unsupported for a model that llama.cpp does not run."""
    schemes = {recipe.scheme, *(rule.scheme for rule in recipe.rules if rule.scheme)}
    mixed = {scheme(name).weights.gguf for name in schemes}
    if len(mixed) > 1:
        raise UsageError(
            f"schemes {', '.join(sorted(schemes))}: types of GGUF go into one file, other formats into another: choose one kind"
        )
    for option in (EMBEDDINGS, HEAD):
        text = getattr(recipe, option)
        if text not in (None, SOURCE) and parse_end(text, option).weights.gguf != asks_for_gguf(recipe):
            kind = f"a type of GGUF, for instance q8_0, or {SOURCE}" if asks_for_gguf(recipe) else "int2 to int8"
            raise UsageError(
                f"--{option} {text} and scheme {recipe.scheme}: expected {kind}: one file has one kind of formats"
            )
        if text not in (None, SOURCE) and not parse_end(text, option).weights.for_lookups:
            raise UsageError(
                f"--{option} {text}: llama.cpp looks up rows without the scale of the tensor: use another type, for instance "
                "gguf_mxfp4"
            )
    if not asks_for_gguf(recipe):
        return
    folded = next((t for t in transforms if TRANSFORMS[t].stage != "block"), None)
    if folded is not None:
        raise UsageError(
            f"method {recipe.method} and scheme {recipe.scheme}: {folded} changes the model before it is quantized, which "
            f"is not for {WHAT} yet: use rtn, gptq, gptq+signround or auto"
        )
    refused = {
        "--export": recipe.export is not None,
        "--group-size": recipe.group_size is not None,
        "outliers": bool(recipe.outliers),
        "a low-rank part": bool(recipe.rank),
        "--significant": bool(recipe.significant),
        "--prune-experts": bool(recipe.prune_experts),
        "--unloaded": recipe.unloaded is not None,
        "--keep-source": any(rule.keep for rule in recipe.rules),
        "--kv": kv is not None,
    }
    used = next((name for name, wrong in refused.items() if wrong), None)
    if used is not None:
        raise UsageError(f"{used} and scheme {recipe.scheme}: not for {WHAT} yet: leave {used} out")
    if not structure.is_language_model:
        raise Unsupported(f"{WHAT} is for language models, and this is a {type(structure.model).__name__}")
    architecture = structure.gguf.architecture  # raises what the converter does not know
    types = {scheme(name).weights.name for name in schemes}
    if NVFP4 in types and architecture not in _SCALED:
        raise Unsupported(
            f"scheme {NVFP4}: llama.cpp leaves out the scale of a tensor in parts of {architecture}: use gguf_mxfp4"
        )


def most_used(packed: Mapping[str, LinearPlan]) -> str:
    """The type that most weights have."""
    weights: dict[str, int] = {}
    for p in packed.values():
        weights[p.weights.name] = weights.get(p.weights.name, 0) + p.shape[0] * p.shape[1]
    return max(weights, key=lambda name: weights[name])


def gguf_bytes(structure: ModelStructure, packed: Mapping[str, LinearPlan]) -> int:
    """The exact size of the file with these decisions. Raises UsageError for types that one tensor of the file cannot have."""
    written, data, scaled = structure.gguf, 0, list[str]()
    turned = next((p.name for p in packed.values() if float_reason(structure, p.name, p.shape[1])), None)
    if turned is not None:
        raise Unsupported(f"{turned}: {TURNED}: use --embeddings {SOURCE} or --head {SOURCE}")
    for tensor in written.tensors:
        p = type_of(tensor, packed)
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        data += aligned(float_bytes(tensor) if p is None else block_bytes(p.weights, (rows, columns)))
        scaled += [] if p is None or p.weights.scale != "e4m3" else [scale_name(tensor.name)]
    return _header(written, scaled) + data


def gguf_header_bytes(structure: ModelStructure) -> int:
    """The bytes of the file that are no weights: keys, places of tensors, and what the converter adds to the floats of the
    checkpoint."""
    written, tensors = structure.gguf, structure.checkpoint.tensors
    made = sum(aligned(float_bytes(tensor)) for tensor in written.tensors)
    stored = sum(plain_bytes(info) for name, info in tensors.items() if name not in structure.tied)
    return _header(written, []) + made - stored


def _header(written: Container, scaled: list[str]) -> int:
    tensors = [(tensor.name, len(tensor.shape), 0) for tensor in written.tensors] + [(name, 1, 4) for name in scaled]
    return file_bytes(file_keys(written, next(iter(GGUF_FORMATS))), tensors)


def float_bytes(tensor: FileTensor) -> int:
    """The bytes of a tensor of the file that is not quantized."""
    return math.prod(tensor.shape) * (4 if tensor.kind == "F32" else 2)


def scale_name(name: str) -> str:
    """The tensor of the file that has the scale of an NVFP4 tensor."""
    return f"{name.removesuffix('.weight')}{SCALE}"


def type_of(tensor: FileTensor, packed: Mapping[str, LinearPlan]) -> LinearPlan | None:
    """A decision that stands for all matrices of a tensor of the file; None where it is not quantized. Raises UsageError."""
    if tensor.rows is None or tensor.rows.unit != tensor.shape[-1] or tensor.rows.change != 0:
        return None
    names = [name.removesuffix(".weight") for name in tensor.rows.held]
    plans = [packed.get(name) for name in names]
    first = plans[0]
    for name, p in zip(names, plans, strict=True):
        if (p and p.weights) != (first and first.weights):
            types = [x.weights.name if x else "no type" for x in (first, p)]
            raise UsageError(
                f"{names[0]} gets {types[0]} and {name} {types[1]}, and GGUF has them in one tensor, {tensor.name}: give them "
                "one type by a rule"
            )
    if first is not None and first.weights.scale == "e4m3" and len(names) > 1:
        raise UsageError(f"{names[0]}: {first.weights.name} is not for several matrices in one tensor: use gguf_mxfp4")
    return first


def float_reason(structure: ModelStructure, name: str, columns: int) -> str | None:
    """Why a matrix cannot be blocks of GGUF, and stays as it is."""
    if columns % 32:
        return ODD_WIDTH.format(columns)
    place = structure.gguf.places.get(f"{name}.weight")
    return None if place is None or place.in_rows else TURNED


def in_one_tensor(structure: ModelStructure, linears: Collection[str]) -> list[tuple[str, ...]]:
    """Linears that GGUF has in one tensor, which has one type."""
    held = [tensor.rows.held for tensor in structure.gguf.tensors if tensor.rows is not None]
    groups = [tuple(n.removesuffix(".weight") for n in names) for names in held if len(names) > 1]
    return [group for group in groups if set(group) <= set(linears)]


def with_types_of_ends(recipe: Recipe, structure: ModelStructure) -> Recipe:
    """The recipe with types for the embeddings and the head where it has none, and 'source' taken out.

    As llama.cpp has it: a head, tied or not, in Q6_K, or Q8_0 where 256 does not divide its width or the scheme is Q8_0;
    embeddings of their own in the scheme of the file.
    """
    given = {option: getattr(recipe, option) for option in (EMBEDDINGS, HEAD)}
    if asks_for_gguf(recipe):
        table = structure.checkpoint.tensors[structure.stored_name(f"{structure.family.embeddings}.weight")]
        wide, own = fit_gguf(GGUF_FORMATS["q6_k"], table.shape[1]), scheme(recipe.scheme).weights
        head = "q8_0" if wide is None or recipe.scheme.lower() == "q8_0" else wide.name
        if structure.tied:
            asked = given[EMBEDDINGS] or given[HEAD] or head
            given = {EMBEDDINGS: asked, HEAD: None}
        else:
            table_type = own.name if own.for_lookups else head
            given = {EMBEDDINGS: given[EMBEDDINGS] or table_type, HEAD: given[HEAD] or head}
    return recipe.model_copy(update={option: None if text == SOURCE else text for option, text in given.items()})
