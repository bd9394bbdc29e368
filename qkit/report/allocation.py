"""An allocation as one page: what was chosen for every unit, and what the alternatives would have cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkit.allocation.allocate import Allocation
from qkit.allocation.pareto import Point, cost_of, curve, mean_bits, uniform
from qkit.report.figures import allocation_bars, heat_map, pareto_plot, png, unit_of
from qkit.report.page import data_uri, page
from qkit.sensitivity.profile import Profile, UnitProfile

_NAMED = 12  # linears of a unit that the page names: experts are hundreds


def allocation_files(made: Profile, allocation: Allocation) -> dict[str, bytes]:
    """{file name: content}: the pictures and the page, which needs none of them beside it."""
    points = curve(made, allocation.measure)
    pictures = _pictures(made, allocation, points)
    page = _page(made, allocation, points, pictures)
    return {**{f"{name}.png": picture for name, picture in pictures.items()}, "allocation.html": page.encode()}


def allocation_html(made: Profile, allocation: Allocation, points: Sequence[Point]) -> str:
    """The page. points: of the Pareto curve; it may be empty."""
    return _page(made, allocation, points, _pictures(made, allocation, points))


def next_larger(unit: UnitProfile, pick: str, measure: str) -> tuple[str, float] | None:
    """(the unit's next larger candidate, cost that it takes away per 1000 bytes); None for the largest."""
    now = unit.choices[pick]
    larger = min(((c.bytes, n) for n, c in unit.choices.items() if c.bytes > now.bytes), default=None)
    if larger is None:
        return None
    size, name = larger
    return name, (now.costs[measure] - unit.choices[name].costs[measure]) / ((size - now.bytes) / 1000)


def _pictures(made: Profile, allocation: Allocation, points: Sequence[Point]) -> dict[str, bytes]:
    measure = allocation.measure
    chosen = (mean_bits(made, allocation.bytes), cost_of(made, allocation.picks, measure))
    return {
        "heat_map": png(heat_map(made, measure)),
        "allocation": png(allocation_bars(made, allocation.picks)),
        "pareto": png(pareto_plot(points, chosen, uniform(made, measure), measure)),
    }


def _page(made: Profile, allocation: Allocation, points: Sequence[Point], pictures: Mapping[str, bytes]) -> str:
    return page(
        "allocation",
        measure=allocation.measure,
        cost_unit=unit_of(allocation.measure),
        names=made.candidates,
        summary=_summary(made, allocation),
        formats=_formats(made, allocation),
        units=[_row(made, u, allocation) for u in made.units],
        points=points,
        pictures={name: data_uri(content) for name, content in pictures.items()},
    )


def _summary(made: Profile, a: Allocation) -> dict[str, str]:
    weights = sum(u.weights for u in made.units)
    r = made.request
    groups = sorted({str(g) for g in r["group_sizes"].values() if g is not None})
    return {
        "bits a weight": f"{mean_bits(made, a.bytes):.3f}",
        "bytes of the layers": f"{a.bytes:,}" + ("" if a.limit is None else f" of {a.limit:,}"),
        **_time(a),
        "bytes of everything else": f"{made.fixed_bytes:,}",
        "weights": f"{weights:,} in {sum(len(u.linears) for u in made.units)} linears, {len(made.units)} decisions",
        f"predicted {a.measure}": f"{a.cost:.5g} {unit_of(a.measure)}",
        "optimality gap": f"{a.gap:.2g}",
        "loss of the original": f"{made.base_loss:.5f} nats a token",
        "probes": f"{r['method']}, group size {', '.join(groups) or 'of the format'}",
        "calibration": f"{r['samples']} rows of {r['seqlen']} tokens, losses on {r['rows']} of them",
        "checkpoint": made.fingerprint,
    }


def _time(a: Allocation) -> dict[str, str]:
    if a.time is None or a.time_limit is None:
        return {}
    return {"time of the layers' products": f"{a.time / 1e6:.4g} of {a.time_limit / 1e6:.4g} ms"}


def _formats(made: Profile, a: Allocation) -> list[dict[str, Any]]:
    """By candidate: what it got in this plan, and the whole model at it, predicted and measured."""
    everywhere = uniform(made, a.measure)
    found = []
    for name in made.candidates:
        units = [u for u in made.units if a.picks[u.key] == name]
        bits, cost = everywhere.get(name, (None, None))
        found.append(
            {
                "name": name,
                "linears": sum(len(u.linears) for u in units),
                "weights": sum(u.weights for u in units),
                "bytes": sum(u.choices[name].bytes for u in units),
                "bits": bits,
                "cost": cost,
                "measured": made.whole[name]["kl"] if name in made.whole else None,
            }
        )
    return found


def _row(made: Profile, unit: UnitProfile, a: Allocation) -> dict[str, Any]:
    pick = a.picks[unit.key]
    choices = [unit.choices.get(n) for n in made.candidates]
    return {
        "key": unit.key,
        "linears": len(unit.linears),
        "named": ", ".join(unit.linears[:_NAMED]) + (" .." if len(unit.linears) > _NAMED else ""),
        "weights": unit.weights,
        "format": pick,
        "choices": [
            None if c is None else {"bytes": c.bytes, "cost": c.costs[a.measure], "chosen": n == pick}
            for n, c in zip(made.candidates, choices, strict=True)
        ],
        "next": next_larger(unit, pick, a.measure),
    }
