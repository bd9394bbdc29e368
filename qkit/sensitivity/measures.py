"""The measures of a decision's cost, one function each: (context) -> {(unit key, candidate): cost}.

Costs of ``loss``, ``kl``, ``pqi``, ``first``, ``first_x`` and ``fisher`` are in nats a token; ``weight``, ``output`` and
``output_norm`` are relative squared errors. Tokens are those that the loss is of, with images those of the answers; errors of
outputs then weigh tokens by their kind (``outputs.py``). To add a measure: write it, add a line to the table and to
``forecast.py`` what it takes.

  weight       sum |w~ - w|^2 / sum |w|^2
  output       relative squared error of the linears' outputs on sample tokens, as the solver saw them (mean over the unit); of
               rows with images, in the original model
  output_norm  that error in the original model, activations quantized too, and for linears that write to the residual
               stream relative to that stream, each channel times the gain of the norm that reads it next (``outputs.py``)
  first        |g . (w~ - w)|, g the gradient of the loss at w
  first_x      sum over tokens of |g_x . (x~ - x)|: x the unit's input, x~ the same with its activations quantized, g_x the
               gradient of the mean loss at x as far as x works through the unit; 0 where activations stay as they are.
               The absolute value of every token and not of the sum is our choice: the terms have either sign, and in the sum
               most of a unit's error cancels by chance of the rows. Measured on tiny-llama at W8A8, NVFP4 and MXFP4: rank
               correlation with kl 0.99 or more, of the absolute value of the sum 0.3 to 0.6
  fisher       1/2 sum F_j (w~_j - w_j)^2, F the mean over rows of squared gradients: the diagonal of the empirical Fisher
  pqi          the unit's share of gbar . (w~ - w), gbar the mean gradient on the path on which all units go to
               that candidate at once (``pqi.py``): what the unit costs where the others are quantized too; the shares of
               rows, columns and single weights are kept in a file (``decomposition.py``)
  loss         the measured change of the loss with only that unit replaced
  kl           KL(original || model with only that unit replaced), mean over tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qkit.calibration.batches import batches
from qkit.calibration.dataset import Calibration
from qkit.families.blocks import LANGUAGE
from qkit.sensitivity.candidates import Candidate
from qkit.sensitivity.decomposition import decompose, decomposition_file, save_decomposition
from qkit.sensitivity.original import Original, WholeOriginal
from qkit.sensitivity.outputs import OutputSample, has_modules
from qkit.sensitivity.pqi import mean_gradients, weight_shares
from qkit.sensitivity.probes import Activations, Probes
from qkit.sensitivity.reference_model import ReferenceModel, Replacement
from qkit.sensitivity.result_cache import ResultCache
from qkit.sensitivity.units import Unit, applies
from qkit.system.progress import Progress
from qkit.tensor.activations import quantize_activations
from qkit.transforms.balance import gradients, ratios

Costs = dict[tuple[str, str], float]
_ROWS = 4096  # of a matrix that an error is computed of at a time


@dataclass(kw_only=True)
class MeasureContext:
    """The inputs of a measure. folder: of the profile"""

    original: Original
    probes: Probes
    units: tuple[Unit, ...]
    candidates: tuple[Candidate, ...]
    rows: Calibration
    points: int
    progress: Progress
    result_cache: ResultCache
    folder: Path

    @property
    def quantizing(self) -> list[Candidate]:
        """The candidates that quantize."""
        return [c for c in self.candidates if c.scheme is not None]

    @property
    def choices(self) -> list[tuple[Unit, Candidate]]:
        """Every unit with every candidate that quantizes it."""
        return [(u, c) for u in self.units for c in self.quantizing if applies(u, c)]

    @property
    def reference_model(self) -> ReferenceModel:
        """The whole model, which is there for all but the measures of ``names.BLOCKWISE``."""
        assert isinstance(self.original, WholeOriginal)
        return self.original.model

    def changed(self, picks: Sequence[tuple[Unit, Candidate]]) -> tuple[float, float]:
        """The loss with these units at these candidates, and the KL divergence from the original."""
        return self.original.changed([(u, partial(self.probes.replacements, u, c)) for u, c in picks])


def weight_error(context: MeasureContext) -> Costs:
    """The relative squared error of the weights of every unit and candidate."""

    def relative_error(unit: Unit, replacements: Mapping[str, Replacement]) -> float:
        original = {n: context.original.weight(n) for n in replacements}
        error = sum(float((r.weight - original[n]).double().square().sum()) for n, r in replacements.items())
        return error / max(sum(float(w.double().square().sum()) for w in original.values()), 1e-30)

    return _cost_each(context, "weight errors", relative_error)


def output_error(context: MeasureContext) -> Costs:
    """The relative squared error of outputs, as the solver measured it; with images as ``_outputs``."""
    if context.rows.kinds is not None:
        return _outputs(context, weights_only=True)
    return {(u.key, c.name): context.probes.output_error(u, c) for u, c in context.choices}


def output_norm_error(context: MeasureContext) -> Costs:
    """The relative squared error of outputs as the next norm reads them (``outputs.py``)."""
    return _outputs(context, weights_only=False)


def _outputs(context: MeasureContext, weights_only: bool) -> Costs:
    language_units = [u for u in context.units if has_modules(u) and u.part == LANGUAGE]
    sample = OutputSample(context.reference_model, language_units, context.rows, ratios=_ratios(context))
    costs = _cost_each(
        context, "output errors", lambda u, replacements: sample.error(u, replacements, weights_only), language_units
    )
    # Inputs of fused experts are not seen, and towers have other tokens: theirs are the errors that the solver saw.
    other = [(u, c) for u, c in context.choices if u not in language_units]
    costs.update({(u.key, c.name): context.probes.output_error(u, c) for u, c in other})
    return costs


def _ratios(context: MeasureContext) -> list[dict[str, float]]:
    """By block and part, of rows with images: the gradient at images over that at answers, measured once."""
    if context.rows.kinds is None:
        return []
    kind_ratios: list[dict[str, float]] | None = context.result_cache.get("ratios")
    if kind_ratios is None:
        context.progress.start("gradients at pictures and answers", context.rows.samples)
        original = context.reference_model
        kind_ratios = ratios(gradients(original.model, original.structure, context.rows, context.progress.step))
        context.result_cache.put("ratios", kind_ratios)
    return kind_ratios


def first_order(context: MeasureContext) -> Costs:
    """The first-order loss change by weights, |g . (w~ - w)|, in nats a token."""
    return _by_gradients(context, "first order", lambda g, d: g * d, squares=False)


def first_order_inputs(context: MeasureContext) -> Costs:
    # Fused experts are no modules: their inputs are not quantized in ReferenceModel.replaced either, and cost nothing here.
    """The first-order loss change by quantized inputs, in nats a token."""
    module_units = [u for u in context.units if has_modules(u)]
    quantizing_inputs = [c for c in context.quantizing if c.scheme is not None and c.scheme.activations is not None]
    costs: Costs = {(u.key, c.name): 0.0 for u in context.units for c in context.quantizing}
    if not quantizing_inputs:
        return costs
    quantizers = [(u.key, c.name, context.probes.activations(u, c)) for u in module_units for c in quantizing_inputs]

    def terms(inputs: dict[str, tuple[Tensor, Tensor]]) -> list[float]:
        signed = (
            torch.stack([input_terms(*inputs[n], a) for n, a in acts.items()]).sum(0) for _, _, acts in quantizers
        )
        return [float(s.abs().sum(dtype=torch.float64)) for s in signed]

    context.progress.start("first order of inputs", len(batches(context.rows)))
    for chunk in context.reference_model.with_inputs(
        context.rows, [x.name for u in module_units for x in u.linears], terms
    ):
        for (key, name, _), term in zip(quantizers, chunk, strict=True):
            costs[key, name] += term
        context.progress.step()
    return costs


def input_terms(x: Tensor, g: Tensor, activations: Activations) -> Tensor:
    """g . (x~ - x) of every token, [rows, length]. x, g: [rows, length, in]; activations: what makes x~ of x."""
    return (g * (quantize_activations(x, *activations) - x)).sum(-1)


def fisher(context: MeasureContext) -> Costs:
    """Half the Fisher-weighted squared error of the weights, in nats a token."""
    return _by_gradients(context, "Fisher", lambda f, d: 0.5 * f * d.square(), squares=True)


def _by_gradients(context: MeasureContext, task: str, cost: Callable[[Tensor, Tensor], Tensor], squares: bool) -> Costs:
    """Of every unit and candidate |the sum of ``cost`` over its weights|. cost: of gradients, or the mean of their squares, and
    of w~ - w, [rows, in] each"""

    def summed(gradient: Tensor, moved: Tensor, weight: Tensor) -> float:
        parts = zip(*(t.split(_ROWS) for t in (gradient, moved, weight)), strict=True)
        return sum(float(cost(g, m - w).sum(dtype=torch.float64)) for g, m, w in parts)

    costs: Costs = {}
    for found in context.original.gradients(_names(context), squares):
        units = [u for u in context.units if u.linears[0].name in found]

        def cost_of(_: Unit, replacements: Mapping[str, Replacement], found: dict[str, Tensor] = found) -> float:
            return abs(sum(summed(found[n], r.weight, context.original.weight(n)) for n, r in replacements.items()))

        costs.update(_cost_each(context, task, cost_of, units))
    return costs


def pqi(context: MeasureContext) -> Costs:
    """Each unit's share of the post-quantization integral, in nats a token."""
    costs: Costs = {}
    for candidate in context.quantizing:
        shares = context.result_cache.get(f"pqi {candidate.name}")
        if shares is None or not decomposition_file(context.folder, candidate.name).is_file():
            shares = _integrate(context, candidate)
            context.result_cache.put(f"pqi {candidate.name}", shares)
        costs.update({(u.key, candidate.name): shares[u.key] for u in context.units})
    return costs


def _integrate(context: MeasureContext, candidate: Candidate) -> dict[str, float]:
    """Every unit's cost; the decomposition is on the disk when this returns."""
    units = [u for u in context.units if applies(u, candidate)]
    targets = {n: r.weight for u in units for n, r in context.probes.replacements(u, candidate).items()}
    context.progress.start(f"{candidate.name}: PQI", context.points)
    gbar = mean_gradients(context.reference_model, targets, context.rows, context.points, step=context.progress.step)

    def decomposed(name: str) -> tuple[float, dict[str, Tensor]]:
        s = weight_shares(context.reference_model.weight(name), targets[name], gbar[name])
        return float(s.sum(dtype=torch.float64)), decompose(s)

    names = [n for n in _names(context) if n in targets]  # embeddings have no format with quantized inputs
    decomposed_linears = dict(zip(names, context.reference_model.pool.map(decomposed, names), strict=True))
    save_decomposition(context.folder, candidate.name, {n: parts for n, (_, parts) in decomposed_linears.items()})
    return {
        u.key: sum((decomposed_linears[x.name][0] for x in u.linears if x.name in targets), 0.0) for u in context.units
    }


def loss_change(context: MeasureContext) -> Costs:
    """The measured loss change with one unit replaced, in nats a token."""
    return {k: loss - context.original.base_loss for k, (loss, _) in _one_at_a_time(context).items()}


def divergence(context: MeasureContext) -> Costs:
    """The measured KL divergence with one unit replaced, in nats a token."""
    return {k: kl for k, (_, kl) in _one_at_a_time(context).items()}


MEASURES: dict[str, Callable[[MeasureContext], Costs]] = {
    "weight": weight_error,
    "output": output_error,
    "output_norm": output_norm_error,
    "first": first_order,
    "first_x": first_order_inputs,
    "fisher": fisher,
    "pqi": pqi,
    "loss": loss_change,
    "kl": divergence,
}


def run_measure(context: MeasureContext, name: str) -> Costs:
    """The costs of a measure, from the result cache where a stopped run left them. (The slowest measures keep their own
    parts there.)"""
    if name in ("pqi", "loss", "kl"):
        return MEASURES[name](context)
    missing = tuple(c for c in context.quantizing if context.result_cache.get(f"{name} {c.name}") is None)
    costs = MEASURES[name](replace(context, candidates=missing)) if missing else {}
    for c in missing:
        context.result_cache.put(
            f"{name} {c.name}", {u: cost for (u, candidate), cost in costs.items() if candidate == c.name}
        )
    return {
        (u, c.name): cost
        for c in context.quantizing
        for u, cost in context.result_cache.get(f"{name} {c.name}").items()
    }


def _names(context: MeasureContext) -> list[str]:
    return [x.name for u in context.units for x in u.linears]


def _cost_each(
    context: MeasureContext,
    task: str,
    cost_of: Callable[[Unit, Mapping[str, Replacement]], float],
    units: Sequence[Unit] | None = None,
) -> Costs:
    """``cost_of`` of every unit (of ``units``) and candidate that quantizes it."""
    costs: Costs = {}
    choices = [(u, c) for u, c in context.choices if units is None or u in units]
    context.progress.start(task, len(choices))
    for unit, candidate in choices:
        costs[unit.key, candidate.name] = cost_of(unit, context.probes.replacements(unit, candidate))
        context.progress.step()
    return costs


def _one_at_a_time(context: MeasureContext) -> dict[tuple[str, str], tuple[float, float]]:
    """(loss, KL) with one unit replaced at a time; each is measured once, whichever measure asks first."""
    divergences: dict[tuple[str, str], tuple[float, float]] = {}
    context.progress.start("one unit at a time", len(context.choices))
    for unit, candidate in context.choices:
        key = f"alone {unit.key} {candidate.name}"
        measurement = context.result_cache.get(key)
        if measurement is None:
            measurement = context.changed([(unit, candidate)])
            context.result_cache.put(key, measurement)
        divergences[unit.key, candidate.name] = (measurement[0], measurement[1])
        context.progress.step()
    return divergences
