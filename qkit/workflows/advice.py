"""The default method of a request that names none, beside a better one and its cost."""

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
    """The method of a request that names none, with a better one.

    chosen: the default; better: a method that this request can have, None: none; ratio: its operations in those of the
    default, None: they are not known before it runs; export: the name that its result then has in config.json, where it is
    another one.
    """

    chosen: str
    better: str | None = None
    ratio: float | None = None
    export: str | None = None

    def __str__(self) -> str:
        """One line for a person."""
        choice = f"method: {self.chosen} (no --method is given)"
        if self.better is None:
            return f"{choice}: it rounds to nearest"
        cost = (
            "and runs calibration samples"
            if self.ratio is None
            else f"and takes about {times(self.ratio)} the operations"
        )
        loads = "" if self.export is None else " (its result then loads only where qkit is imported)"
        return f"{choice}: {self.better} is more accurate {cost}: add --method {self.better}{loads}"


def times(ratio: float) -> str:
    """The ratio in words, '3.2 times', '1,400 times': two digits, since operations are not seconds."""
    return f"{float(f'{ratio:.2g}'):,g} times"


def advise_method(request: Request, prepared: PreparedRequest) -> Advice | None:
    """The advice on the method of a request; None: the request or its recipe names it. prepared: the request, prepared."""
    recipe = recipe_of(request)
    if "method" in recipe.model_fields_set:
        return None
    operations = sum(prepared.forecast.operations.values())
    for method in _better(recipe):
        with suppress(QkitError):  # what this model cannot have is no advice
            better = prepare(replace(request, method=method), prepared.plan.calibration)
            is_known = better.plan.calibration is None or better.plan.calibration.trajectory is None
            ratio = sum(better.forecast.operations.values()) / operations if is_known and operations else None
            export = better.plan.export if better.plan.export != prepared.plan.export else None
            return Advice(recipe.method, method, ratio, export)
    return Advice(recipe.method)


def _better(recipe: Recipe) -> tuple[str, ...]:
    """Methods in the order of preference."""
    scheme, _, _ = recipe.resolve(None)
    inputs = scheme.activations
    return tuple(dict.fromkeys((BETTER[None if inputs is None else inputs.kind], BETTER[None])))
