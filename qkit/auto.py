"""Method auto: a short list of recipes is tried on every block, and what serves the block best is kept.

What is compared is what leaves the block: its mean squared distance from what leaves it in the original model (weighed by the
loss, where learned rounding is), on rows that no recipe was solved with. The list is ``recipe.TRIES``: GPTQ as it is,
with half of the inputs' drift made up for, behind AWQ's or SmoothQuant's scales, and rounding to nearest. What
is written beside 'auto' (rotate+auto, auto+signround) comes with each of them. That the choice is made block by block is
ours: scales of one group of linears are folded into another of the same block, and so are not chosen by themselves.

A plan holds what differs between the recipes (``Plan.tries``); all of them make files of the same format.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qkit.calibration import Calibration
from qkit.families.outline import Outline
from qkit.forecast import Forecast, forecast
from qkit.plan import Plan, make_plan
from qkit.recipe import Recipe, Try, tries_of
from qkit.transforms.table import TRANSFORMS


def plan_of(
    recipe: Recipe, outline: Outline, calibration: Calibration | None, seed: int, kv: dict[str, Any] | None
) -> Plan:
    """The plan of a recipe, as ``make_plan``; of a method with 'auto' that of the first recipe, with all of them in it."""
    beyond = outline.family.streams is not None
    plans = {name: make_plan(r, outline, calibration, seed, kv) for name, r in tries_of(recipe, beyond).items()}
    if not plans:
        return make_plan(recipe, outline, calibration, seed, kv)
    tries = {
        name: Try(p.transforms, {x.name: (x.solver, x.options) for x in p.linears.values()})
        for name, p in plans.items()
    }
    used = {t for p in plans.values() for t in p.transforms}
    first = next(iter(plans.values()))
    return replace(first, transforms=tuple(t for t in TRANSFORMS if t in used), recipe=recipe.model_dump(), tries=tries)


def attempt(plan: Plan, tried: Try) -> Plan:
    """The plan with one of its recipes alone."""
    linears = {
        name: replace(p, solver=tried.solvers[name][0], options=tried.solvers[name][1])
        for name, p in plan.linears.items()
    }
    return replace(plan, transforms=tried.transforms, linears=linears, tries={})


def forecast_of(plan: Plan, outline: Outline, workers: int, after: dict[str, int]) -> Forecast:
    """As ``forecast``; of a plan with several recipes the operations of all of them, and the memory of the largest."""
    if not plan.tries:
        return forecast(plan, outline, workers, after)
    each = [forecast(attempt(plan, t), outline, workers, after) for t in plan.tries.values()]
    largest = max(each, key=lambda f: f.peak_memory)
    operations = {k: sum(f.operations[k] for f in each) for k in largest.operations}
    return replace(largest, operations=operations)
