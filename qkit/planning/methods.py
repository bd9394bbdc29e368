"""The check that a method suits a model: what cannot work is refused in one sentence before anything is planned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qkit.calibration.dataset import Calibration
from qkit.errors import Unsupported, UsageError
from qkit.families.discover import kind_of
from qkit.families.structure import ModelStructure
from qkit.planning.kept import check_keeping
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.recipe import Recipe
from qkit.rounding.learned_scale import has_learned_scales
from qkit.transforms.rotate import check_rotatable
from qkit.transforms.table import TRANSFORMS

if TYPE_CHECKING:
    from qkit.planning.plan import Plan

UNTIED = "after rotation the head has its own weight: the embeddings are no longer tied"


def check_method(
    recipe: Recipe, transforms: tuple[str, ...], structure: ModelStructure, calibration: Calibration | None
) -> None:
    """Raises Unsupported for a model that a transform cannot work with, UsageError for rows or options that it cannot use."""
    check_keeping(recipe, transforms)
    twin = next(iter(structure.twins), None)
    if calibration is not None and twin is not None:
        raise Unsupported(
            f"{structure.checkpoint.path}: {structure.twins[twin]} and {twin} have the same weights and different inputs, and "
            "what the second reads is not measured: use method rtn and a scheme that measures nothing"
        )
    if "rotate" in transforms:
        check_rotatable(structure)
    balanced = next((t for t in transforms if "modality_weights" in TRANSFORMS[t].needs), None)
    if balanced is not None and not structure.family.text_types:
        raise Unsupported(
            f"method {balanced} balances images and answers, and this is no vision-language model "
            f"({kind_of(structure.checkpoint.config)}): use awq"
        )
    if balanced is not None and calibration is not None and calibration.kinds is None:
        raise UsageError(
            f"method {balanced} needs image-text data: use a .jsonl file or a folder for --calib, or leave it out"
        )
    if "hadamard" in transforms and structure.family.streams is None:
        raise Unsupported("method hadamard transforms inputs at run time, in diffusion transformers: use rotate")
    if "residual" in transforms:
        _check_residual(recipe, transforms)
    if recipe.significant and not structure.is_language_model:
        raise Unsupported(
            f"--significant needs the loss of a language model, and a {type(structure.model).__name__} is none: set it to 0"
        )
    share = recipe.options.get("compensate", 0)
    if share and structure.family.streams is not None:
        raise Unsupported(
            "option 'compensate' needs samples of one shape, which a diffusion transformer does not have: leave it out"
        )
    if recipe.options.get("guided") and (structure.towers or not structure.is_language_model):
        raise Unsupported(
            "option 'guided' needs the predictions of a language model of texts alone, and this is none: leave it out"
        )
    fused = any(x.expert is not None for b in structure.blocks for x in b.linears)
    if recipe.options.get("e2e_steps"):
        _check_end_to_end(structure, fused)
    learned = next((t for t in transforms if TRANSFORMS[t].stage == "block"), None)
    if learned is None:
        return
    if fused:
        raise Unsupported(
            f"method {learned} needs linears that are modules, and this model has fused experts: use gptq"
        )
    if recipe.options.get("loss_weighted"):
        if not structure.is_language_model:
            raise Unsupported(
                "option 'loss_weighted' needs the loss of a language model, and this is none: leave it out"
            )
        if "rotate" in transforms:
            raise UsageError(
                "option 'loss_weighted' and method rotate exclude each other: the loss is measured before the rotation"
            )


def _check_end_to_end(structure: ModelStructure, fused: bool) -> None:
    """fused: whether experts are slices of one parameter"""
    if structure.towers or not structure.is_language_model:
        raise Unsupported(
            "option 'e2e_steps' needs the predictions of a language model, and this is none: leave it out"
        )
    if fused:
        raise Unsupported(
            "option 'e2e_steps' needs linears that are modules, and this model has fused experts: set it to 0"
        )


def _check_residual(recipe: Recipe, transforms: tuple[str, ...]) -> None:
    for option, in_use in (("method hadamard", "hadamard" in transforms), ("--significant", recipe.significant)):
        if in_use:
            raise UsageError(f"method residual and {option} exclude each other: leave one of the two out")


def check_doubled(method: str, transforms: tuple[str, ...], doubled: int) -> None:
    """Raises Unsupported where residual channels are asked for and no layer has any. doubled: how many of them all layers
    have."""
    if "residual" in transforms and not doubled:
        raise Unsupported(
            f"method {method}: residual channels need inputs with one scale per small group, which no layer has: "
            "use scheme nvfp4"
        )


def check_learned_scales(linears: Iterable[LinearPlan]) -> None:
    """Raises UsageError where end-to-end learning is asked for and no layer has scales that it can move."""
    asked = [p for p in linears if p.options.get("e2e_steps")]
    if asked and not any(has_learned_scales(p.weights) for p in asked):
        raise UsageError(
            f"option 'e2e_steps' learns scales, and {asked[0].weights.name} has none that can be learned: set it to 0"
        )


def method_notes(plan: Plan, structure: ModelStructure) -> list[str]:
    """What the methods of a plan make of this model that nobody would expect."""
    notes = [UNTIED] if plan.untied else []
    if plan.recipe["expert_share"] and not plan.needs_rows:
        notes.append("a share of tokens for every expert changes nothing: this method measures nothing")
    elif plan.recipe["expert_share"] and not any(g.expert is not None for b in structure.every_block for g in b.groups):
        notes.append(
            "a share of tokens for every expert changes nothing: no router of this model sends tokens to experts"
        )
    if plan.own_method is not None:
        notes.append(f"config.json gets quant_method qkit in place of compressed-tensors: {plan.own_method}")
    if "rotate" in plan.transforms:
        heads = sum(structure.stream.of(b.path).values is not None for b in structure.blocks)
        notes.append(
            f"rotate: {len(structure.blocks)} blocks are rotated, {heads} of them with the values of their heads; a block of "
            "every kind proves it before anything is written"
        )
    scaling = [t for t in plan.transforms if TRANSFORMS[t].stage == "stats" and t != "residual"]
    if not scaling or not structure.is_discovered or structure.family.streams is not None:
        return notes
    groups = [(g, {plan.schemes.get(x.name) for x in g.linears}) for b in structure.blocks for g in b.groups]
    planned = [g for g, schemes in groups if None not in schemes and len(schemes) == 1]
    scaled = sum(len(g.linears) for g in planned if g.declared.source is not None)
    count = f"{scaled} of {len(plan.linears)} linears are" if scaled else "no linear is"
    have = "which the others do not have" if scaled else "and none has one"
    notes.append(
        f"{' and '.join(scaling)}: {count} scaled; a scale is folded into a norm or a linear that feeds nothing else, {have}"
    )
    return notes
