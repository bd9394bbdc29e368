"""The rules of results in GGUF: when a recipe asks for one, what cannot be in it, and the types of its ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.errors import Unsupported, UsageError
from qkit.families.ends import EMBEDDINGS, HEAD
from qkit.families.structure import ModelStructure
from qkit.files.gguf_container import ROPE, SCALE, WHAT, container
from qkit.files.gguf_size import file_bytes, file_keys
from qkit.planning.recipe import SOURCE, Recipe, parse_end
from qkit.planning.sizes import linear_bytes, plain_bytes
from qkit.tensor.formats import GGUF_FORMATS, fit_gguf, scheme
from qkit.tensor.gguf_blocks import aligned

if TYPE_CHECKING:
    from qkit.planning.linear_plan import LinearPlan

GGUF = "gguf"  # as a method of export
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
    if transforms:
        raise UsageError(
            f"method {recipe.method} and scheme {recipe.scheme}: {WHAT} is made by the methods rtn and gptq alone: use one of "
            "them"
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
        raise UsageError(f"{used} and scheme {recipe.scheme}: not for {WHAT} yet: leave one of the two out")
    if not structure.is_language_model:
        raise Unsupported(f"{WHAT} is for language models, and this is a {type(structure.model).__name__}")
    checkpoint = structure.checkpoint
    container(checkpoint.path, checkpoint.config, [n for n in checkpoint.tensors if n not in structure.tied])


def most_used(packed: Mapping[str, LinearPlan]) -> str:
    """The type that most weights have."""
    weights: dict[str, int] = {}
    for p in packed.values():
        weights[p.weights.name] = weights.get(p.weights.name, 0) + p.shape[0] * p.shape[1]
    return max(weights, key=lambda name: weights[name])


def gguf_bytes(structure: ModelStructure, packed: Mapping[str, LinearPlan]) -> int:
    """The exact size of the file with these decisions."""
    total = gguf_header_bytes(structure, [p for p in packed.values() if p.weights.scale == "e4m3"])
    for name, info in structure.checkpoint.tensors.items():
        if name not in structure.tied:
            p = packed.get(name.removesuffix(".weight"))
            size = None if p is None else linear_bytes(p.weights, None, p.shape, structure.dtype)
            total += plain_bytes(info) if size is None else aligned(size)
    return total


def gguf_header_bytes(structure: ModelStructure, scaled: Sequence[LinearPlan] = ()) -> int:
    """The bytes of the file that are no weights: keys, places of tensors, and factors of frequencies. scaled: what has a
    scale of its whole tensor beside its blocks."""
    checkpoint = structure.checkpoint
    stored = [n for n in checkpoint.tensors if n not in structure.tied]
    scales = [f"{p.name}{SCALE}" for p in scaled]
    written = container(checkpoint.path, checkpoint.config, stored + scales)
    tensors = [(written.names[name][0], len(checkpoint.tensors[name].shape), 0) for name in stored]
    tensors += [(written.names[name][0], 1, 4) for name in scales]
    if written.rope is not None:
        tensors.append((ROPE, 1, 4 * len(written.rope)))
    return file_bytes(file_keys(written, next(iter(GGUF_FORMATS))), tensors)


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
