"""The page of an allocation: the choice for every unit, and the cost of the alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkit.allocation.allocate import Allocation
from qkit.allocation.pareto import Point, cost_of, curve, mean_bits, uniform
from qkit.report.figures import allocation_bars, heat_map, pareto_plot, png, unit_of
from qkit.report.page import data_uri, page
from qkit.sensitivity.profile import Profile, UnitProfile

_NAMED = 12  # linears of a unit that the page names: experts are hundreds


def allocation_files(profile: Profile, allocation: Allocation) -> dict[str, bytes]:
    """The images and the page of an allocation, {file name: content}; the page needs none of the images beside it."""
    points = curve(profile, allocation.measure)
    images = _images(profile, allocation, points)
    page = _page(profile, allocation, points, images)
    return {**{f"{name}.png": image for name, image in images.items()}, "allocation.html": page.encode()}


def allocation_html(profile: Profile, allocation: Allocation, points: Sequence[Point]) -> str:
    """The page of an allocation. points: of the Pareto curve; it may be empty."""
    return _page(profile, allocation, points, _images(profile, allocation, points))


def next_larger(unit: UnitProfile, pick: str, measure: str) -> tuple[str, float] | None:
    """The unit's next larger candidate, and the cost that it saves per 1000 bytes; None for the largest."""
    current = unit.choices[pick]
    larger = min(((c.bytes, n) for n, c in unit.choices.items() if c.bytes > current.bytes), default=None)
    if larger is None:
        return None
    size, name = larger
    return name, (current.costs[measure] - unit.choices[name].costs[measure]) / ((size - current.bytes) / 1000)


def _images(profile: Profile, allocation: Allocation, points: Sequence[Point]) -> dict[str, bytes]:
    measure = allocation.measure
    chosen = (mean_bits(profile, allocation.bytes), cost_of(profile, allocation.picks, measure))
    return {
        "heat_map": png(heat_map(profile, measure)),
        "allocation": png(allocation_bars(profile, allocation.picks)),
        "pareto": png(pareto_plot(points, chosen, uniform(profile, measure), measure)),
    }


def _page(profile: Profile, allocation: Allocation, points: Sequence[Point], images: Mapping[str, bytes]) -> str:
    return page(
        "allocation",
        measure=allocation.measure,
        cost_unit=unit_of(allocation.measure),
        names=profile.candidates,
        summary=_summary(profile, allocation),
        formats=_formats(profile, allocation),
        units=[_row(profile, u, allocation) for u in profile.units],
        points=points,
        pictures={name: data_uri(content) for name, content in images.items()},
    )


def _summary(profile: Profile, a: Allocation) -> dict[str, str]:
    weights = sum(u.weights for u in profile.units)
    r = profile.request
    groups = sorted({str(g) for g in r["group_sizes"].values() if g is not None})
    return {
        "bits a weight": f"{mean_bits(profile, a.bytes):.3f}",
        "bytes of the layers": f"{a.bytes:,}" + ("" if a.limit is None else f" of {a.limit:,}"),
        **_time(a),
        "bytes of everything else": f"{profile.fixed_bytes:,}",
        "weights": f"{weights:,} in {sum(len(u.linears) for u in profile.units)} linears, {len(profile.units)} decisions",
        f"predicted {a.measure}": f"{a.cost:.5g} {unit_of(a.measure)}",
        "optimality gap": f"{a.gap:.2g}",
        "loss of the original": f"{profile.base_loss:.5f} nats a token",
        "probes": f"{r['method']}, group size {', '.join(groups) or 'of the format'}",
        "calibration": f"{r['samples']} rows of {r['seqlen']} tokens, losses on {r['rows']} of them",
        "checkpoint": profile.fingerprint,
    }


def _time(a: Allocation) -> dict[str, str]:
    if a.time is None or a.time_limit is None:
        return {}
    return {"time of the layers' products": f"{a.time / 1e6:.4g} of {a.time_limit / 1e6:.4g} ms"}


def _formats(profile: Profile, a: Allocation) -> list[dict[str, Any]]:
    """By candidate: what it got in this plan, and the whole model at it, predicted and measured."""
    everywhere = uniform(profile, a.measure)
    formats = []
    for name in profile.candidates:
        units = [u for u in profile.units if a.picks[u.key] == name]
        bits, cost = everywhere.get(name, (None, None))
        formats.append(
            {
                "name": name,
                "linears": sum(len(u.linears) for u in units),
                "weights": sum(u.weights for u in units),
                "bytes": sum(u.choices[name].bytes for u in units),
                "bits": bits,
                "cost": cost,
                "measured": profile.whole[name]["kl"] if name in profile.whole else None,
            }
        )
    return formats


def _row(profile: Profile, unit: UnitProfile, a: Allocation) -> dict[str, Any]:
    pick = a.picks[unit.key]
    choices = [unit.choices.get(n) for n in profile.candidates]
    return {
        "key": unit.key,
        "linears": len(unit.linears),
        "named": ", ".join(unit.linears[:_NAMED]) + (" .." if len(unit.linears) > _NAMED else ""),
        "weights": unit.weights,
        "format": pick,
        "choices": [
            None if c is None else {"bytes": c.bytes, "cost": c.costs[a.measure], "chosen": n == pick}
            for n, c in zip(profile.candidates, choices, strict=True)
        ],
        "next": next_larger(unit, pick, a.measure),
    }
