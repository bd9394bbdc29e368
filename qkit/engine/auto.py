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

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.block_runner import Flow
from qkit.calibration.dataset import Calibration
from qkit.calibration.statistics import Rows
from qkit.engine.block_step import Run, SolvedBlock, Step, load_state, quantize_inputs, solve_block
from qkit.engine.forecast import Forecast, forecast
from qkit.engine.learning import LOSS_WEIGHTS
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan, make_plan
from qkit.planning.recipe import Recipe, RecipeTrial, trial_recipes
from qkit.rounding.block import held_out, held_out_error
from qkit.transforms.table import TRANSFORMS


def plan_of(
    recipe: Recipe, structure: ModelStructure, calibration: Calibration | None, seed: int, kv: dict[str, Any] | None
) -> Plan:
    """The plan of a recipe, as ``make_plan``; of a method with 'auto' that of the first recipe, with all of them in it."""
    beyond = structure.family.streams is not None
    plans = {name: make_plan(r, structure, calibration, seed, kv) for name, r in trial_recipes(recipe, beyond).items()}
    if not plans:
        return make_plan(recipe, structure, calibration, seed, kv)
    tries = {
        name: RecipeTrial(p.transforms, {x.name: (x.solver, x.options) for x in p.linears.values()})
        for name, p in plans.items()
    }
    used = {t for p in plans.values() for t in p.transforms}
    first = next(iter(plans.values()))
    return replace(first, transforms=tuple(t for t in TRANSFORMS if t in used), recipe=recipe.model_dump(), tries=tries)


def attempt(plan: Plan, tried: RecipeTrial) -> Plan:
    """The plan with one of its recipes alone."""
    linears = {
        name: replace(p, solver=tried.solvers[name][0], options=tried.solvers[name][1])
        for name, p in plan.linears.items()
    }
    return replace(plan, transforms=tried.transforms, linears=linears, tries={})


def forecast_of(plan: Plan, structure: ModelStructure, workers: int, after: dict[str, int]) -> Forecast:
    """As ``forecast``; of a plan with several recipes the operations of all of them, and the memory of the largest."""
    if not plan.tries:
        return forecast(plan, structure, workers, after)
    each = [forecast(attempt(plan, t), structure, workers, after) for t in plan.tries.values()]
    largest = max(each, key=lambda f: f.peak_memory)
    operations = {k: sum(f.operations[k] for f in each) for k in largest.operations}
    return replace(largest, operations=operations)


def best_recipe(run: Run, step: Step, rows: Rows, call: Call | OneByOne) -> tuple[Step, SolvedBlock]:
    """Every recipe of the plan on the block anew, and the one that errs least on held-out rows, put in place again."""
    first_held = rows.count - held_out(rows.count)
    given = replace(rows, good=[good and i < first_held for i, good in enumerate(rows.good)])
    targets = replace(rows, path=run.job.rows_path(step.place + 1, original=True))
    errors, best = dict[str, float](), None
    for name, tried in run.plan.tries.items():
        alone = replace(run, plan=attempt(run.plan, tried))
        state = load_state(alone, step.state.block, language=True)
        state.originals = step.state.originals
        attempted = replace(step, state=state, name=f"{step.name}, {name}")
        flow = Flow(state.module, state.block, given, call, run.pool)
        try:
            solved = solve_block(alone, attempted, flow, rows, call)
        finally:
            flow.close()
        error = held_out_error(state.module, rows, targets, call, run.pool, state.given.get(LOSS_WEIGHTS))
        for handle in solved.handles:
            handle.remove()
        errors[name] = float(f"{error:.6g}")
        if best is None or error < best[0]:
            values = {n: t.clone() for n, t in state.module.state_dict().items()}
            best = error, name, replace(attempted, name=step.name), solved, values
    assert best is not None
    _, name, chosen, solved, values = best
    chosen.state.module.load_state_dict(values)
    results = [replace(r, recipe=name) for r in solved.results]
    noted = {**solved.noted, "recipe": name, "held_out_errors": errors}
    return chosen, SolvedBlock(results, quantize_inputs(chosen.state, results), noted)
