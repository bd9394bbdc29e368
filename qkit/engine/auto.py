"""Method auto: tries a short list of recipes on every block, and keeps the best one.

The criterion is the mean squared error of the block's outputs against the original model (weighted by the loss, where learned
rounding is), on rows that no recipe was solved with. The list is ``recipe.TRIES``: GPTQ, GPTQ that
compensates half of the inputs' drift, GPTQ after AWQ's or SmoothQuant's scales, and rounding to nearest. Methods joined with
'auto' (rotate+auto, auto+signround) are part of each recipe. Choosing block by block is our design: scales of one group of
linears are folded into another one of the same block, so groups cannot choose independently.

A plan holds the differences between the recipes (``Plan.tries``). All of them give files of the same format.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.block_runner import BlockRunner
from qkit.calibration.dataset import Calibration
from qkit.calibration.statistics import Rows
from qkit.engine.block_step import BlockStep, Run, SolvedBlock, load_state, quantize_inputs, solve_block
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
    """The plan of a recipe, as ``make_plan`` gives it. For method 'auto' it is that of the first recipe, and lists all
    of them.
    """
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


def attempt(plan: Plan, recipe: RecipeTrial) -> Plan:
    """The plan with one of its recipes only."""
    linears = {
        name: replace(p, solver=recipe.solvers[name][0], options=recipe.solvers[name][1])
        for name, p in plan.linears.items()
    }
    return replace(plan, transforms=recipe.transforms, linears=linears, tries={})


def forecast_of(plan: Plan, structure: ModelStructure, workers: int, later_memory: dict[str, int]) -> Forecast:
    """The forecast of a plan; with several recipes, the operations of all of them, and the memory of the largest."""
    if not plan.tries:
        return forecast(plan, structure, workers, later_memory)
    forecasts = [forecast(attempt(plan, t), structure, workers, later_memory) for t in plan.tries.values()]
    largest = max(forecasts, key=lambda f: f.peak_memory)
    operations = {k: sum(f.operations[k] for f in forecasts) for k in largest.operations}
    return replace(largest, operations=operations)


def best_recipe(run: Run, step: BlockStep, rows: Rows, call: Call | OneByOne) -> tuple[BlockStep, SolvedBlock]:
    """The block solved with the recipe that has the least error on held-out rows, after all recipes were tried."""
    first_held = rows.count - held_out(rows.count)
    fit_rows = replace(rows, good=[good and i < first_held for i, good in enumerate(rows.good)])
    targets = replace(rows, path=run.job.rows_path(step.place + 1, original=True))
    errors, best = dict[str, float](), None
    for name, recipe in run.plan.tries.items():
        recipe_run = replace(run, plan=attempt(run.plan, recipe))
        state = load_state(recipe_run, step.state.block, language=True)
        state.originals = step.state.originals
        recipe_step = replace(step, state=state, name=f"{step.name}, {name}")
        runner = BlockRunner(state.module, state.block, fit_rows, call, run.pool)
        try:
            solved = solve_block(recipe_run, recipe_step, runner, rows, call)
        finally:
            runner.close()
        error = held_out_error(state.module, rows, targets, call, run.pool, state.original_values.get(LOSS_WEIGHTS))
        for handle in solved.handles:
            handle.remove()
        errors[name] = float(f"{error:.6g}")
        if best is None or error < best[0]:
            values = {n: t.clone() for n, t in state.module.state_dict().items()}
            best = error, name, replace(recipe_step, name=step.name), solved, values
    assert best is not None
    _, name, chosen, solved, values = best
    chosen.state.module.load_state_dict(values)
    results = [replace(r, recipe=name) for r in solved.results]
    entry = {**solved.notes, "recipe": name, "held_out_errors": errors}
    return chosen, SolvedBlock(results, quantize_inputs(chosen.state, results), entry)
