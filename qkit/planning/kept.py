"""Linears that stay as a source that is quantized already stores them: ``--keep-source``, or ``keep: true`` in a recipe.

Their numbers go into the result unchanged, where its format has a place for them: the same codes and scales under the names of
compressed-tensors. What the source holds in full precision stays so.
"""

from __future__ import annotations

from typing import Any

from qkit.errors import Unsupported, UsageError
from qkit.files.checkpoint import Checkpoint
from qkit.files.sources.decoded import DecodedInfo, Kept
from qkit.files.sources.packed import looked_at
from qkit.planning.recipe import Recipe
from qkit.tensor.formats import SCHEMES
from qkit.transforms.table import TRANSFORMS

KEPT = "kept"  # in place of a solver's name
PLAIN_REASON = "--keep-source leaves it as it is, and the source holds it in full precision"
_REWRITES = ("load", "stats")  # stages of transforms that rewrite weights


def kept_fields(name: str, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the plan says of a linear that is kept; None where the source does not quantize it. Raises Unsupported for one whose
    numbers a result has no place for."""
    info = checkpoint.tensors.get(f"{name}.weight")
    view = checkpoint.views.get(f"{name}.weight")
    if view is not None and any(isinstance(checkpoint.sources[s], DecodedInfo) for s in view.sources):
        info = None
    elif info is not None and not isinstance(info, DecodedInfo):
        return None
    why = "the source stores it in one tensor with others" if info is None else looked_at(info, checkpoint)
    if isinstance(why, str):
        how = "" if info is None else f" ({info.encoding})"
        raise Unsupported(
            f"{name}: --keep-source cannot keep it as the source stores it{how}: {why}: leave it out of the pattern, and it is "
            "quantized anew"
        )
    pair = (why.weights, why.activations)
    scheme = next((s.name for s in SCHEMES.values() if (s.weights, s.activations) == pair), why.weights.name.upper())
    return {"scheme": scheme, "weights": why.weights, "activations": why.activations, "solver": KEPT}


def check_keeping(recipe: Recipe, transforms: tuple[str, ...]) -> None:
    """Raises UsageError for a transform that would rewrite weights that are to stay."""
    rewriting = next((t for t in transforms if TRANSFORMS[t].stage in _REWRITES), None)
    if rewriting is not None and any(rule.keep for rule in recipe.rules):
        raise UsageError(
            f"--keep-source and method {rewriting}, which rewrites the weights of neighbouring layers, exclude each other: "
            "use rtn, gptq or signround, or leave --keep-source out"
        )


def stored_as(name: str, checkpoint: Checkpoint) -> tuple[DecodedInfo, Kept]:
    """Of a linear that the plan keeps: its header in the source, and how it goes into the result."""
    info = checkpoint.tensors[f"{name}.weight"]
    assert isinstance(info, DecodedInfo) and isinstance(info.kept, Kept)
    return info, info.kept
