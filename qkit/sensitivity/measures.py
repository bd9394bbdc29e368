"""The measures of a decision's cost, one function each: (bench) -> {(unit key, candidate): cost}.

Costs of ``loss``, ``kl``, ``pqi``, ``first``, ``first_x`` and ``fisher`` are in nats a token; ``weight``, ``output`` and
``output_norm`` are relative squared errors. Tokens are those that the loss is of, with pictures those of the answers; errors of
outputs then weigh tokens by their kind (``outputs.py``). To add a measure: write it, add a line to the table and to
``forecast.py`` what it takes.

  weight       sum |w~ - w|^2 / sum |w|^2
  output       relative squared error of the linears' outputs on sample tokens, as the solver saw them (mean over the unit); of
               rows with pictures, in the original model
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
from pathlib import Path

import torch
from torch import Tensor

from qkit.calibration.batches import batches
from qkit.calibration.dataset import Calibration
from qkit.families.blocks import LANGUAGE
from qkit.files.offload import Chunks
from qkit.sensitivity.candidates import Candidate
from qkit.sensitivity.decomposition import decompose, decomposition_file, save_decomposition
from qkit.sensitivity.outputs import OutputSample, has_modules
from qkit.sensitivity.pqi import mean_gradients, share
from qkit.sensitivity.probes import Activations, Probes
from qkit.sensitivity.reference_model import ReferenceModel, Replacement
from qkit.sensitivity.result_cache import ResultCache
from qkit.sensitivity.units import Unit
from qkit.system.progress import Progress
from qkit.tensor.activations import quantize_activations
from qkit.transforms.balance import gradients, ratios

Costs = dict[tuple[str, str], float]


@dataclass(kw_only=True)
class MeasureContext:
    """What a measure works on. reference: log probabilities of the original on ``rows``, batch by batch; folder: of the
    profile."""

    subject: ReferenceModel
    probes: Probes
    units: tuple[Unit, ...]
    candidates: tuple[Candidate, ...]
    rows: Calibration
    points: int
    progress: Progress
    base_loss: float
    reference: Chunks
    result_cache: ResultCache
    folder: Path

    @property
    def quantizing(self) -> list[Candidate]:
        return [c for c in self.candidates if c.scheme is not None]

    def whole(self, candidate: Candidate) -> dict[str, Replacement]:
        """Every unit at one candidate."""
        return {n: r for u in self.units for n, r in self.probes.replacements(u, candidate).items()}


def weight_error(bench: MeasureContext) -> Costs:
    def one(unit: Unit, found: Mapping[str, Replacement]) -> float:
        original = {n: bench.subject.weight(n) for n in found}
        error = sum(float((r.weight - original[n]).double().square().sum()) for n, r in found.items())
        return error / max(sum(float(w.double().square().sum()) for w in original.values()), 1e-30)

    return _each(bench, "weight errors", one)


def output_error(bench: MeasureContext) -> Costs:
    if bench.rows.kinds is not None:
        return _outputs(bench, alone=True)
    return {(u.key, c.name): bench.probes.output_error(u, c) for u in bench.units for c in bench.quantizing}


def output_next(bench: MeasureContext) -> Costs:
    return _outputs(bench, alone=False)


def _outputs(bench: MeasureContext, alone: bool) -> Costs:
    plain = [u for u in bench.units if has_modules(u) and u.part == LANGUAGE]
    sample = OutputSample(bench.subject, plain, bench.rows, ratios=_ratios(bench))
    costs = _each(bench, "output errors", lambda u, found: sample.error(u, found, alone), plain)
    # Inputs of fused experts are not seen, and towers have other tokens: theirs are the errors that the solver saw.
    rest = [u for u in bench.units if u not in plain]
    costs.update({(u.key, c.name): bench.probes.output_error(u, c) for u in rest for c in bench.quantizing})
    return costs


def _ratios(bench: MeasureContext) -> list[dict[str, float]]:
    """By block and part, of rows with pictures: the gradient at pictures over that at answers, measured once."""
    if bench.rows.kinds is None:
        return []
    found: list[dict[str, float]] | None = bench.result_cache.get("ratios")
    if found is None:
        bench.progress.start("gradients at pictures and answers", bench.rows.samples)
        subject = bench.subject
        found = ratios(gradients(subject.model, subject.structure, bench.rows, bench.progress.step))
        bench.result_cache.put("ratios", found)
    return found


def first_order(bench: MeasureContext) -> Costs:
    _, g = bench.subject.gradients(bench.rows, _names(bench))

    def one(unit: Unit, found: Mapping[str, Replacement]) -> float:
        return abs(sum(float((g[n] * (r.weight - bench.subject.weight(n))).double().sum()) for n, r in found.items()))

    return _each(bench, "first order", one)


def first_inputs(bench: MeasureContext) -> Costs:
    # Fused experts are no modules: their inputs are not quantized in ReferenceModel.replaced either, and cost nothing here.
    plain = [u for u in bench.units if has_modules(u)]
    moved = [c for c in bench.quantizing if c.scheme is not None and c.scheme.activations is not None]
    costs: Costs = {(u.key, c.name): 0.0 for u in bench.units for c in bench.quantizing}
    if not moved:
        return costs
    found = [(u.key, c.name, bench.probes.activations(u, c)) for u in plain for c in moved]

    def terms(seen: dict[str, tuple[Tensor, Tensor]]) -> list[float]:
        signed = (torch.stack([input_terms(*seen[n], a) for n, a in acts.items()]).sum(0) for _, _, acts in found)
        return [float(s.abs().sum(dtype=torch.float64)) for s in signed]

    bench.progress.start("first order of inputs", len(batches(bench.rows)))
    for chunk in bench.subject.with_inputs(bench.rows, [x.name for u in plain for x in u.linears], terms):
        for (key, name, _), term in zip(found, chunk, strict=True):
            costs[key, name] += term
        bench.progress.step()
    return costs


def input_terms(x: Tensor, g: Tensor, activations: Activations) -> Tensor:
    """g . (x~ - x) of every token, [rows, length]. x, g: [rows, length, in]; activations: what makes x~ of x."""
    return (g * (quantize_activations(x, *activations) - x)).sum(-1)


def fisher(bench: MeasureContext) -> Costs:
    _, f = bench.subject.gradients(bench.rows, _names(bench), squares=True)

    def one(unit: Unit, found: Mapping[str, Replacement]) -> float:
        moved = ((f[n], r.weight - bench.subject.weight(n)) for n, r in found.items())
        return 0.5 * sum(float((fisher * d.square()).double().sum()) for fisher, d in moved)

    return _each(bench, "Fisher", one)


def pqi(bench: MeasureContext) -> Costs:
    costs: Costs = {}
    for candidate in bench.quantizing:
        known = bench.result_cache.get(f"pqi {candidate.name}")
        if known is None or not decomposition_file(bench.folder, candidate.name).is_file():
            known = _integrate(bench, candidate)
            bench.result_cache.put(f"pqi {candidate.name}", known)
        costs.update({(u.key, candidate.name): known[u.key] for u in bench.units})
    return costs


def _integrate(bench: MeasureContext, candidate: Candidate) -> dict[str, float]:
    """Every unit's cost; the decomposition is on the disk when this returns."""
    targets = {n: r.weight for n, r in bench.whole(candidate).items()}
    bench.progress.start(f"{candidate.name}: PQI", bench.points)
    gbar = mean_gradients(bench.subject, targets, bench.rows, bench.points, step=bench.progress.step)

    def one(name: str) -> tuple[float, dict[str, Tensor]]:
        s = share(bench.subject.weight(name), targets[name], gbar[name])
        return float(s.sum(dtype=torch.float64)), decompose(s)

    names = _names(bench)
    found = dict(zip(names, bench.subject.pool.map(one, names), strict=True))
    save_decomposition(bench.folder, candidate.name, {n: parts for n, (_, parts) in found.items()})
    return {u.key: sum(found[x.name][0] for x in u.linears) for u in bench.units}


def loss_change(bench: MeasureContext) -> Costs:
    return {k: loss - bench.base_loss for k, (loss, _) in _alone(bench).items()}


def divergence(bench: MeasureContext) -> Costs:
    return {k: kl for k, (_, kl) in _alone(bench).items()}


MEASURES: dict[str, Callable[[MeasureContext], Costs]] = {
    "weight": weight_error,
    "output": output_error,
    "output_norm": output_next,
    "first": first_order,
    "first_x": first_inputs,
    "fisher": fisher,
    "pqi": pqi,
    "loss": loss_change,
    "kl": divergence,
}


def measured(bench: MeasureContext, name: str) -> Costs:
    """A measure's costs, from the ledger where a stopped run left them. (What takes longest keeps its own parts there.)"""
    if name in ("pqi", "loss", "kl"):
        return MEASURES[name](bench)
    missing = tuple(c for c in bench.quantizing if bench.result_cache.get(f"{name} {c.name}") is None)
    costs = MEASURES[name](replace(bench, candidates=missing)) if missing else {}
    for c in missing:
        bench.result_cache.put(
            f"{name} {c.name}", {u: cost for (u, candidate), cost in costs.items() if candidate == c.name}
        )
    return {
        (u, c.name): cost for c in bench.quantizing for u, cost in bench.result_cache.get(f"{name} {c.name}").items()
    }


def _names(bench: MeasureContext) -> list[str]:
    return [x.name for u in bench.units for x in u.linears]


def _each(
    bench: MeasureContext,
    what: str,
    one: Callable[[Unit, Mapping[str, Replacement]], float],
    units: Sequence[Unit] | None = None,
) -> Costs:
    """``one`` of every unit (of ``units``) and candidate that quantizes it."""
    costs: Costs = {}
    units = bench.units if units is None else units
    bench.progress.start(what, len(units) * len(bench.quantizing))
    for unit in units:
        for candidate in bench.quantizing:
            costs[unit.key, candidate.name] = one(unit, bench.probes.replacements(unit, candidate))
            bench.progress.step()
    return costs


def _alone(bench: MeasureContext) -> dict[tuple[str, str], tuple[float, float]]:
    """(loss, KL) with one unit replaced at a time; each is measured once, whichever measure asks first."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    bench.progress.start("one unit at a time", len(bench.units) * len(bench.quantizing))
    for unit in bench.units:
        for candidate in bench.quantizing:
            key = f"alone {unit.key} {candidate.name}"
            known = bench.result_cache.get(key)
            if known is None:
                with bench.subject.replaced(bench.probes.replacements(unit, candidate)):
                    known = bench.subject.compare(bench.rows, bench.reference)
                bench.result_cache.put(key, known)
            found[unit.key, candidate.name] = (known[0], known[1])
            bench.progress.step()
    return found
