"""The check that a method suits a model: what cannot work is refused in one sentence before anything is planned."""

from __future__ import annotations

from qkit.calibration.dataset import Calibration
from qkit.errors import Unsupported, UsageError
from qkit.families.discover import kind_of
from qkit.families.structure import ModelStructure
from qkit.planning.kept import check_keeping
from qkit.planning.recipe import Recipe
from qkit.transforms.rotate import check_rotatable
from qkit.transforms.table import TRANSFORMS


def check_method(
    recipe: Recipe, transforms: tuple[str, ...], structure: ModelStructure, calibration: Calibration | None
) -> None:
    """Raises Unsupported for a model that a transform cannot work with, UsageError for rows or options that it cannot use."""
    check_keeping(recipe, transforms)
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
    if recipe.significant and structure.family.streams is not None:
        raise Unsupported("--significant needs the loss of a language model: leave it out for a diffusion transformer")
    share = recipe.options.get("compensate", 0)
    if share and structure.family.streams is not None:
        raise Unsupported(
            "option 'compensate' needs samples of one shape, which a diffusion transformer does not have: leave it out"
        )
    learned = next((t for t in transforms if TRANSFORMS[t].stage == "block"), None)
    if learned is None:
        return
    if any(x.expert is not None for b in structure.blocks for x in b.linears):
        raise Unsupported(
            f"method {learned} needs linears that are modules, and this model has fused experts: use gptq"
        )
    if recipe.options.get("loss_weighted"):
        if structure.family.streams is not None or structure.family.encodes:
            raise Unsupported(
                "option 'loss_weighted' needs the loss of a language model, and this is none: leave it out"
            )
        if "rotate" in transforms:
            raise UsageError(
                "option 'loss_weighted' and method rotate exclude each other: the loss is measured before the rotation"
            )
    if recipe.options.get("e2e_steps") and (
        structure.towers or structure.family.streams is not None or structure.family.encodes
    ):
        raise Unsupported(
            "option 'e2e_steps' needs the predictions of a language model, and this is none: leave it out"
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
