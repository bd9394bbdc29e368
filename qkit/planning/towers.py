"""The rules for the parts of a model that are not its language model: a recipe states them, or measuring decides."""

from __future__ import annotations

from qkit.errors import UsageError
from qkit.families.structure import ModelStructure
from qkit.planning.recipe import Recipe, Rule
from qkit.tensor.formats import did_you_mean

SKIP, AUTO = "skip", "auto"
_UNMEASURED = "nothing has measured what rounding the {name} costs: --target {name}=SCHEME quantizes it"
_SKIPPED = "the {name} is left as it is (--target {name}=skip)"


def tower_rules(recipe: Recipe, structure: ModelStructure) -> dict[str, Rule]:
    """The rule for the layers of each tower where no rule of the recipe says more, {tower: rule}.

    Measuring (``qkit.workflows.towers``) has put what it found into the recipe; a tower that is still AUTO was measured by
    nothing and is left as it is. Raises UsageError for a target that the model has not.
    """
    if structure.family.streams is not None:
        return {}  # other components of its pipeline are quantized by themselves (``pipeline.prepare``)
    tower_names = [s.name for s in structure.towers]
    on_text = {s.name for s in structure.towers if s.on_text}
    unknown = next((t for t in recipe.targets if t not in tower_names), None)
    if unknown is not None:
        expected = (
            f"expected one of {', '.join(tower_names)}"
            if tower_names
            else "this model has no part but its language model"
        )
        raise UsageError(f"no part {unknown!r} for --target, {expected}{did_you_mean(unknown, tower_names)}")
    rules = {}
    for name in tower_names:
        target = recipe.targets.get(name, AUTO)
        if name in on_text and target == AUTO:
            continue  # it is quantized as the language model is
        scheme, _, reason = target.partition(":")  # "skip: why", as a rule gives its reason
        skip = None
        if scheme in (SKIP, AUTO):
            skip = reason.strip() or (_SKIPPED if scheme == SKIP else _UNMEASURED).format(name=name)
        rules[name] = Rule(match=(name,), skip=skip) if skip else Rule(match=(name,), scheme=scheme)
    return rules
