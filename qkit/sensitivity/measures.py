"""The measures of a decision's cost, one function each: (bench) -> {(unit key, candidate): cost}.

Costs of ``loss``, ``kl``, ``pqi``, ``first`` and ``fisher`` are in nats a token; ``weight`` and ``output`` are relative squared
errors. To add one: write it, and add a line to the table.

  weight   sum |w~ - w|^2 / sum |w|^2
  output   relative squared error of the linears' outputs on sample tokens, as the solver saw them (mean over the unit)
  first    |g . (w~ - w)|, g the gradient of the loss at w
  fisher   1/2 sum F_j (w~_j - w_j)^2, F the mean over rows of squared gradients: the diagonal of the empirical Fisher
  pqi      the unit's share of gbar . (w~ - w), gbar the mean gradient on the path on which all units go to
           that candidate at once (``pqi.py``): what the unit costs where the others are quantized too
  loss     the measured change of the loss with only that unit replaced
  kl       KL(original || model with only that unit replaced), mean over tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from qkit.run import Progress
from qkit.sensitivity.ledger import Ledger
from qkit.sensitivity.pqi import mean_gradients
from qkit.sensitivity.probes import Probes
from qkit.sensitivity.subject import Replacement, Subject
from qkit.sensitivity.units import Candidate, Unit

Costs = dict[tuple[str, str], float]


@dataclass
class Bench:
    """What a measure works on. reference: log probabilities of the original on ``tokens``, chunk by chunk."""

    subject: Subject
    probes: Probes
    units: tuple[Unit, ...]
    candidates: tuple[Candidate, ...]
    tokens: Tensor
    points: int
    progress: Progress
    base_loss: float
    reference: list[Tensor]
    ledger: Ledger

    @property
    def quantizing(self) -> list[Candidate]:
        return [c for c in self.candidates if c.scheme is not None]

    def whole(self, candidate: Candidate) -> dict[str, Replacement]:
        """Every unit at one candidate."""
        return {n: r for u in self.units for n, r in self.probes.replacements(u, candidate).items()}


def weight_error(bench: Bench) -> Costs:
    def one(unit: Unit, found: Mapping[str, Replacement]) -> float:
        original = {n: bench.subject.weight(n) for n in found}
        error = sum(float((r.weight - original[n]).double().square().sum()) for n, r in found.items())
        return error / max(sum(float(w.double().square().sum()) for w in original.values()), 1e-30)

    return _each(bench, "weight errors", one)


def output_error(bench: Bench) -> Costs:
    return {(u.key, c.name): bench.probes.output_error(u, c) for u in bench.units for c in bench.quantizing}


def first_order(bench: Bench) -> Costs:
    _, g = bench.subject.gradients(bench.tokens, _names(bench))

    def one(unit: Unit, found: Mapping[str, Replacement]) -> float:
        return abs(sum(float((g[n] * (r.weight - bench.subject.weight(n))).double().sum()) for n, r in found.items()))

    return _each(bench, "first order", one)


def fisher(bench: Bench) -> Costs:
    _, f = bench.subject.gradients(bench.tokens, _names(bench), squares=True)

    def one(unit: Unit, found: Mapping[str, Replacement]) -> float:
        moved = ((f[n], r.weight - bench.subject.weight(n)) for n, r in found.items())
        return 0.5 * sum(float((fisher * d.square()).double().sum()) for fisher, d in moved)

    return _each(bench, "Fisher", one)


def pqi(bench: Bench) -> Costs:
    costs: Costs = {}
    for candidate in bench.quantizing:
        known = bench.ledger.get(f"pqi {candidate.name}")
        if known is not None:
            costs.update({(u.key, candidate.name): known[u.key] for u in bench.units})
            continue
        targets = {n: r.weight for n, r in bench.whole(candidate).items()}
        bench.progress.start(f"{candidate.name}: PQI", bench.points)
        gbar = mean_gradients(bench.subject, targets, bench.tokens, bench.points, step=bench.progress.step)
        for unit in bench.units:
            moved = ((gbar[x.name], targets[x.name] - bench.subject.weight(x.name)) for x in unit.linears)
            costs[unit.key, candidate.name] = sum(float((g * d).double().sum()) for g, d in moved)
        bench.ledger.put(f"pqi {candidate.name}", {u.key: costs[u.key, candidate.name] for u in bench.units})
    return costs


def loss_change(bench: Bench) -> Costs:
    return {k: loss - bench.base_loss for k, (loss, _) in _alone(bench).items()}


def divergence(bench: Bench) -> Costs:
    return {k: kl for k, (_, kl) in _alone(bench).items()}


MEASURES: dict[str, Callable[[Bench], Costs]] = {
    "weight": weight_error,
    "output": output_error,
    "first": first_order,
    "fisher": fisher,
    "pqi": pqi,
    "loss": loss_change,
    "kl": divergence,
}


def _names(bench: Bench) -> list[str]:
    return [x.name for u in bench.units for x in u.linears]


def _each(bench: Bench, what: str, one: Callable[[Unit, Mapping[str, Replacement]], float]) -> Costs:
    """``one`` of every unit and candidate that quantizes it."""
    costs: Costs = {}
    bench.progress.start(what, len(bench.units) * len(bench.quantizing))
    for unit in bench.units:
        for candidate in bench.quantizing:
            costs[unit.key, candidate.name] = one(unit, bench.probes.replacements(unit, candidate))
            bench.progress.step()
    return costs


def _alone(bench: Bench) -> dict[tuple[str, str], tuple[float, float]]:
    """(loss, KL) with one unit replaced at a time; each is measured once, whichever measure asks first."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    bench.progress.start("one unit at a time", len(bench.units) * len(bench.quantizing))
    for unit in bench.units:
        for candidate in bench.quantizing:
            key = f"alone {unit.key} {candidate.name}"
            known = bench.ledger.get(key)
            if known is None:
                with bench.subject.replaced(bench.probes.replacements(unit, candidate)):
                    known = bench.subject.compare(bench.tokens, bench.reference)
                bench.ledger.put(key, known)
            found[unit.key, candidate.name] = (known[0], known[1])
            bench.progress.step()
    return found
