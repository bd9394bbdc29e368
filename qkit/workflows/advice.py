"""The method that a request gets where it names none, beside a better one and what that costs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

from qkit.errors import QkitError
from qkit.planning.recipe import Recipe
from qkit.planning.request import Request, recipe_of
from qkit.workflows.quantize import PreparedRequest, prepare

# By kind of the inputs' format (None: they are not quantized), what README recommends before anything slower.
BETTER: dict[str | None, str] = {None: "gptq", "int": "smoothquant+gptq", "fp4": "residual+gptq", "fp8": "gptq"}


@dataclass(frozen=True)
class Advice:
    """chosen: the default; better: a method that this request can have, None: none; ratio: its operations in those of
    the default, None: they are not known before it runs; export: the name that its result then has in config.json, where it is
    another one."""

    chosen: str
    better: str | None = None
    ratio: float | None = None
    export: str | None = None

    def __str__(self) -> str:
        """One line for a person."""
        said = f"method: {self.chosen} (no --method is given)"
        if self.better is None:
            return f"{said}: it rounds to nearest"
        cost = (
            "and runs calibration samples"
            if self.ratio is None
            else f"and takes about {times(self.ratio)} the operations"
        )
        loads = "" if self.export is None else " (its result then loads only where qkit is imported)"
        return f"{said}: {self.better} is more accurate {cost}: add --method {self.better}{loads}"


def times(ratio: float) -> str:
    """'3.2 times', '1,400 times': two digits, since operations are not seconds."""
    return f"{float(f'{ratio:.2g}'):,g} times"


def on_method(request: Request, found: PreparedRequest) -> Advice | None:
    """What to say of the method of a request; None: the request or its recipe names it. found: the request, prepared."""
    recipe = recipe_of(request)
    if "method" in recipe.model_fields_set:
        return None
    now = sum(found.forecast.operations.values())
    for method in _better(recipe):
        with suppress(QkitError):  # what this model cannot have is no advice
            other = prepare(replace(request, method=method), found.plan.calibration)
            known = other.plan.calibration is None or other.plan.calibration.trajectory is None
            ratio = sum(other.forecast.operations.values()) / now if known and now else None
            export = other.plan.export if other.plan.export != found.plan.export else None
            return Advice(recipe.method, method, ratio, export)
    return Advice(recipe.method)


def _better(recipe: Recipe) -> tuple[str, ...]:
    """Methods in the order of preference."""
    scheme, _, _ = recipe.resolved(None)
    inputs = scheme.activations
    return tuple(dict.fromkeys((BETTER[None if inputs is None else inputs.kind], BETTER[None])))
