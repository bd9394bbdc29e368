"""The name of the method in config.json: 'compressed-tensors', or 'qkit' for what loaders of that format cannot read."""

from __future__ import annotations

from collections.abc import Mapping

from qkit.errors import Unsupported
from qkit.families.structure import ModelStructure
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.recipe import Recipe, parse_method
from qkit.transforms.table import TRANSFORMS


def own_method_reason(
    recipe: Recipe, structure: ModelStructure, linears: Mapping[str, LinearPlan], significant: int
) -> str | None:
    """Why a result needs qkit's own method name; None where loaders of compressed-tensors read it."""
    branch = next((p.name for p in linears.values() if p.rank), None)
    if branch is not None:
        return f"that format has no place for the low-rank part of {branch}"
    sparse = next((p.name for p in linears.values() if p.outliers), "the whole model" if significant else None)
    if sparse is not None:
        return f"that format has no place for the sparse part of {sparse}"
    if structure.family.encodes:
        return "transformers looks for weights of a T5 that are packed"
    part = next((n for n in linears if n in structure.parts_of_tensors), None)
    if part is not None:
        return f"the source stores {part} transposed, or in one tensor with others, and its loaders look for that"
    unread = next((n for n in linears if n in structure.unread), None)
    if unread is not None:
        return f"the class of this model looks at the weight of {unread} by itself, and its loaders pack it"
    if any(p.residual for p in linears.values()) or _scales_inputs(recipe, structure):
        return "its loaders do not transform inputs as this method does"
    return None


def export_method(recipe: Recipe, reason: str | None) -> str:
    """The method's name. reason: of ``own_method_reason``. Raises Unsupported where the recipe asks for the other one."""
    if reason is not None and recipe.export not in (None, "qkit"):
        advice = ""
        if recipe.rank:
            advice = ", or set rank to 0"
        elif recipe.outliers or recipe.significant:
            advice = ", or set outliers and significant to 0"
        raise Unsupported(f"--export {recipe.export}: {reason}: leave the option out{advice}")
    return recipe.export or "compressed-tensors" if reason is None else "qkit"


def _scales_inputs(recipe: Recipe, structure: ModelStructure) -> bool:
    """Whether inputs are transformed at run time, as those of diffusion transformers may be."""
    stages = [TRANSFORMS[t].stage for t in parse_method(recipe.method)[0]]
    return structure.family.streams is not None and ("inputs" in stages or "stats" in stages)
