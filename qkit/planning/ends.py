"""The decisions for the embeddings and the output head (--embeddings, --head).

They lie outside the blocks, so they have options of their own, and no rule of a recipe is about them. Tied ones are one matrix:
either option quantizes it, and it is stored once.
"""

from __future__ import annotations

from typing import Any

from qkit.errors import UsageError
from qkit.families.ends import EMBEDDINGS, HEAD, End, ends_of, final_norm
from qkit.families.structure import ModelStructure
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.recipe import Recipe, check_options, parse_end
from qkit.solvers.table import SOLVERS
from qkit.tensor.formats import Scheme, fit_group

_ORIGINAL = ("compensate",)  # options that need the inputs in the original model
PLAIN = "rtn"  # lookups have no inputs to weigh errors by
HEAD_REASON = "the output head stays in the model's dtype by default"
TIED_REASON = "the output head shares its weight with the embeddings"
SHARED_REASON = "it is stored once, with the embeddings, and quantized there"


def end_plans(recipe: Recipe, structure: ModelStructure, untied: bool, rows: bool) -> dict[str, LinearPlan]:
    """{checkpoint name: decision} of the matrices at the ends that the recipe has a format for.

    untied: the run makes a head of its own of a tied one (method rotate); rows: calibration rows go through the blocks, so that
    the inputs of the head are there. Raises UsageError for two formats of one matrix,
    Unsupported as ``ends_of``.
    """
    asked = {option: text for option in (EMBEDDINGS, HEAD) if (text := getattr(recipe, option)) is not None}
    if not asked:
        return {}
    ends = ends_of(structure, " and ".join(f"--{option}" for option in asked))
    if HEAD in asked and ends.head is None:
        raise UsageError(
            f"--{HEAD} {asked[HEAD]}: this model has no output head with a matrix of its own: leave it out"
        )
    schemes = {option: parse_end(text, option) for option, text in asked.items()}
    if ends.tied and not untied:
        if len({s.weights for s in schemes.values()}) > 1:
            raise UsageError(
                f"--{EMBEDDINGS} {asked[EMBEDDINGS]} --{HEAD} {asked[HEAD]}: embeddings and output head of this model are "
                "tied, one matrix for both: give both options the same format, or leave one out"
            )
        decided = _decide(ends.embeddings, (EMBEDDINGS, HEAD), next(iter(schemes.values())), recipe, structure, rows)
        return {decided.name: decided}
    by_option = {EMBEDDINGS: ends.embeddings, HEAD: ends.head}
    decisions = [_decide(by_option[option], (option,), s, recipe, structure, rows) for option, s in schemes.items()]
    return {p.name: p for p in decisions}


def skipped_head(structure: ModelStructure, ends: dict[str, LinearPlan]) -> dict[str, str]:
    """{checkpoint name: why it has no format of its own} of the output head, if that is so."""
    head = structure.head
    if head is None or head in ends:
        return {}
    if f"{head}.weight" in structure.tied:
        return {head: SHARED_REASON if any(len(p.uses) > 1 for p in ends.values()) else TIED_REASON}
    return {head: HEAD_REASON}


def _decide(
    end: End | None, uses: tuple[str, ...], scheme: Scheme, recipe: Recipe, structure: ModelStructure, rows: bool
) -> LinearPlan:
    assert end is not None
    weights = fit_group(scheme.weights, end.shape[1], strict=recipe.strict)
    solver, options = _solver(uses, recipe, structure) if rows else (PLAIN, check_options(PLAIN, (), {}))
    notes = []  # that a tied head is this matrix is said where the head is skipped
    if weights.gguf and weights != scheme.weights:
        notes.append(f"{weights.name}: {end.shape[1]} columns are not a multiple of {scheme.weights.columns}")
    elif weights.group != scheme.weights.group:
        size = f"group size {weights.group}" if weights.group else "one scale per row"
        notes.append(f"{size}: {end.shape[1]} columns are not a multiple of {scheme.weights.group}")
    return LinearPlan(
        name=end.name,
        shape=end.shape,
        scheme=weights.name.upper() if weights.gguf else scheme.name,
        weights=weights,
        activations=None,
        solver=solver,
        options=options,
        uses=uses,
        note="; ".join(notes),
    )


def _solver(uses: tuple[str, ...], recipe: Recipe, structure: ModelStructure) -> tuple[str, dict[str, Any]]:
    """The solver of the recipe where it looks at inputs and those of the head can be had: behind the final norm."""
    _, solver, options = recipe.resolve(None)
    if HEAD not in uses or not SOLVERS[solver].needs_hessian or final_norm(structure) is None:
        return PLAIN, check_options(PLAIN, (), {})
    known = {k: v for k, v in options.items() if k in SOLVERS[solver].options and k not in _ORIGINAL}
    return solver, check_options(solver, (), known)
