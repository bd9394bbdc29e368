"""What a method can do with a model: refused in one sentence before anything is planned."""

from __future__ import annotations

from qkit.calibration import Calibration
from qkit.catalog import BALANCED, INPUTS, RATIOS, SHARE, TRANSFORMS
from qkit.errors import Unsupported, UsageError
from qkit.families.discover import kind_of
from qkit.families.outline import Outline
from qkit.recipe import Recipe
from qkit.transforms.rotate import check_rotatable


def check_method(
    recipe: Recipe, transforms: tuple[str, ...], outline: Outline, calibration: Calibration | None
) -> None:
    """Raises Unsupported for a model that a transform cannot work with, UsageError for rows or options that it cannot use."""
    if "rotate" in transforms:
        check_rotatable(outline)
    balanced = next((t for t in transforms if t in BALANCED), None)
    if balanced is not None and not outline.family.text_types:
        raise Unsupported(
            f"method {balanced} weighs pictures against answers, and this is no vision-language model "
            f"({kind_of(outline.checkpoint.config)}): use awq"
        )
    if balanced is not None and calibration is not None and calibration.kinds is None:
        raise UsageError(
            f"method {balanced} needs pictures with answers: give --calib a .jsonl file or a folder, or leave it out"
        )
    if "hadamard" in transforms and outline.family.streams is None:
        raise Unsupported("method hadamard transforms inputs at run time, in diffusion transformers: take rotate")
    if "residual" in transforms:
        _check_residual(recipe, transforms)
    if recipe.significant and outline.family.streams is not None:
        raise Unsupported(
            "--significant looks at the loss of a language model: leave it out for a diffusion transformer"
        )
    for option, known in (("ratios", RATIOS), ("inputs", INPUTS)):
        if recipe.options.get(option, known[0]) not in known:
            raise UsageError(f"option '{option}': expected one of {', '.join(known)}, found {recipe.options[option]!r}")
    share = recipe.options.get("compensate", 0)
    if not 0 <= share <= 1:
        raise UsageError(f"option 'compensate': expected a share, 0 to 1, found {share}")
    if share and outline.family.streams is not None:
        raise Unsupported("option 'compensate' needs rows of one shape, and those of a diffusion transformer are not")
    if recipe.options.get("sweeps", 0) < 0:
        raise UsageError(f"option 'sweeps': expected 0 or more, found {recipe.options['sweeps']}")
    learned = next((t for t in transforms if TRANSFORMS[t].stage == "block"), None)
    if learned is None:
        return
    if any(x.expert is not None for b in outline.blocks for x in b.linears):
        raise Unsupported(
            f"method {learned} learns linears that are modules, and this model has fused experts: use gptq"
        )
    if recipe.options.get("weigh"):
        if outline.family.streams is not None or outline.family.encodes:
            raise Unsupported("option 'weigh' looks at the loss of a language model, and this is none: leave it out")
        if "rotate" in transforms:
            raise UsageError(
                "option 'weigh' and method rotate exclude each other: the loss is looked at before the rotation"
            )
    if recipe.options.get("whole") and (outline.towers or outline.family.streams is not None or outline.family.encodes):
        raise Unsupported(
            "option 'whole' looks at what a language model expects of a text, and this is none: leave it out"
        )
    for option, least in (("steps", 1), ("batch", 1), ("rate", 0), ("whole", 0)):
        if recipe.options.get(option, least) < least:
            raise UsageError(f"option '{option}': expected {least} or more, found {recipe.options[option]}")


def _check_residual(recipe: Recipe, transforms: tuple[str, ...]) -> None:
    if not 0 < recipe.options.get("share", SHARE) <= 1:
        raise UsageError(
            f"option 'share': expected a share of the channels above 0, to 1, found {recipe.options['share']}"
        )
    for what, there in (("method hadamard", "hadamard" in transforms), ("--significant", recipe.significant)):
        if there:
            raise UsageError(f"method residual and {what} exclude each other: leave one of the two out")


def check_doubled(method: str, transforms: tuple[str, ...], doubled: int) -> None:
    """doubled: how many residual channels all layers have. Raises Unsupported where none is, and they were asked for."""
    if "residual" in transforms and not doubled:
        raise Unsupported(
            f"method {method}: residual channels are for inputs with a scale for every few channels, and no layer has such: "
            "take scheme nvfp4"
        )
