"""Figures of a profile, of an allocation and of accuracies.

Figures are made as objects, without pyplot: nothing is global, no window system is asked for, and the same input gives the
same bytes. matplotlib takes a second to import, so each function does it when it is called.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.allocation.pareto import Point
from qkit.report.layout import block_labels, places
from qkit.sensitivity.profile import Profile, UnitProfile
from qkit.system.extras import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = needs("a figure", "report")  # around every import of matplotlib
_DPI = 110
_RELATIVE = ("weight", "output")
_GREY = "0.6"


def unit_of(measure: str) -> str:
    """The unit of a measure's costs."""
    return "relative squared error" if measure in _RELATIVE else "nats a token"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the name of the library that wrote it is left out."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, with its letters as paths: it looks the same in every browser, and is sharp at every size."""
    with FIGURES:
        from matplotlib import rc_context
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "qkit"}):  # names within the file would be other ones at every call
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def heat_map(profile: Profile, measure: str) -> Figure:
    """The cost of every unit in every candidate: a row per block, a column per kind of unit and candidate, log colours.

    Cells of what a unit cannot get are blank; costs of zero and below have a colour of their own, below the scale. What
    keeps a unit as it is costs nothing by definition and has no column.
    """
    import numpy as np

    with FIGURES:
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

    unit_places, labels = places(profile), block_labels(profile)
    kinds = list(dict.fromkeys(p.kind for p in unit_places.values()))
    names = [n for n in profile.candidates if n != "keep"]
    rows, columns = {b: i for i, b in enumerate(labels)}, {k: i * len(names) for i, k in enumerate(kinds)}
    cells = np.full((len(rows), len(kinds) * len(names)), np.nan)
    for unit in profile.units:
        place = unit_places[unit.key]
        for j, name in enumerate(names):
            if name in unit.choices:
                cells[rows[place.block], columns[place.kind] + j] = unit.choices[name].costs[measure]
    positive = cells[cells > 0]  # NaN compares false
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1e-9, 1.0)
    if not low < high:  # a scale needs two ends
        high = low * 10
    has_zeros = bool((cells <= 0).any())
    cells[cells <= 0] = low / 10
    figure = Figure(figsize=(2.6 + 0.3 * max(cells.shape[1], 12), 1.9 + 0.24 * max(len(rows), 8)), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["viridis"].with_extremes(under="0.8", bad="white")
    drawn = axes.imshow(np.ma.masked_invalid(cells), norm=LogNorm(low, high), cmap=colours, aspect="auto")
    step = 1 + (len(rows) - 1) // 64
    axes.set_yticks(range(0, len(rows), step), list(labels.values())[::step], fontsize=8)
    axes.set_xticks(range(cells.shape[1]), names * len(kinds), rotation=90, fontsize=8)
    centres = [c + (len(names) - 1) / 2 for c in columns.values()]
    above = axes.secondary_xaxis("top")
    above.set_xticks(centres, kinds, fontsize=9, rotation=0 if max(map(len, kinds)) <= 3 * len(names) else 30)
    above.tick_params(length=0)
    for start in list(columns.values())[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=3)
    axes.set_ylabel("block")
    bar = figure.colorbar(drawn, ax=axes, extend="min" if has_zeros else "neither", pad=0.02)
    bar.set_label(f"{measure} ({unit_of(measure)})" + ("; grey: zero or less" if has_zeros else ""))
    return figure


def allocation_bars(profile: Profile, picks: Mapping[str, str]) -> Figure:
    """The bytes of each block as a bar, stacked by format, with the block's mean bits on top; below it the share of
    weights."""
    with FIGURES:
        from matplotlib.figure import Figure

    unit_places, labels = places(profile), block_labels(profile)
    colours = _colours(profile)
    used_names = [n for n in profile.candidates if n in picks.values()]
    x = range(len(labels))
    units = [[u for u in profile.units if unit_places[u.key].block == b] for b in labels]
    sizes = [sum(u.choices[picks[u.key]].bytes for u in block) for block in units]
    weights = [sum(u.weights for u in block) for block in units]
    scale, unit = (1e6, "MB") if max(sizes) >= 1e6 else (1e3, "kB")
    figure = Figure(figsize=(2.2 + 0.32 * max(len(labels), 14), 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    bar_bottoms = [0.0] * len(labels)
    share = [0.0] * len(labels)
    for name in used_names:
        block_units = [[u for u in block if picks[u.key] == name] for block in units]
        block_sizes = [sum(u.choices[name].bytes for u in block) / scale for block in block_units]
        part = [100 * sum(u.weights for u in block) / total for block, total in zip(block_units, weights, strict=True)]
        top.bar(x, block_sizes, 0.8, bottom=bar_bottoms, color=colours[name], label=name)
        bottom.bar(x, part, 0.8, bottom=share, color=colours[name])
        bar_bottoms = [a + b for a, b in zip(bar_bottoms, block_sizes, strict=True)]
        share = [a + b for a, b in zip(share, part, strict=True)]
    for i, (size, total) in enumerate(zip(sizes, weights, strict=True)):
        top.annotate(
            f"{8 * size / total:.2f}",
            (i, bar_bottoms[i]),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            rotation=90 if len(labels) > 20 else 0,
        )
    top.margins(y=0.12)
    top.set_ylabel(f"{unit} (above: mean bits)")
    bottom.set_ylabel("% of weights")
    bottom.set_ylim(0, 100)
    long = max(map(len, labels.values())) > 3
    step = 1 + (len(labels) - 1) // 64
    bottom.set_xticks(x[::step], list(labels.values())[::step], fontsize=8, rotation=90 if long else 0)
    bottom.set_xlim(-0.6, len(labels) - 0.4)
    bottom.set_xlabel("block")
    figure.legend(loc="outside upper center", ncols=min(len(used_names), 6), frameon=False)
    return figure


def pareto_plot(
    points: Sequence[Point],
    chosen: tuple[float, float] | None,
    uniform: Mapping[str, tuple[float, float]],
    measure: str = "kl",
) -> Figure:
    """Predicted cost against mean bits: the curve, uniform formats, the chosen plan, and measured KL divergences.

    chosen, uniform: (bits, cost). What was measured is in nats: where costs are not, it gets an axis of its own.
    """
    with FIGURES:
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    axes.plot([p.bits for p in points], [p.cost for p in points], "o-", ms=3.5, color="C0", label="exact allocations")
    if uniform:
        axes.plot(*zip(*uniform.values(), strict=True), "s", ms=6, color=_GREY, label="one format everywhere")
    for name, (bits, cost) in uniform.items():
        axes.annotate(name, (bits, cost), (6, 5), textcoords="offset points", fontsize=9, color="0.35")
    if chosen is not None:
        axes.plot(*chosen, "*", ms=16, color="C3", markeredgecolor="white", label="chosen", zorder=4)
    costs = [p.cost for p in points] + [c for _, c in uniform.values()] + ([] if chosen is None else [chosen[1]])
    measured = [(p.bits, p.measured) for p in points if p.measured is not None]
    if measured:
        separate_axis = unit_of(measure) != unit_of("kl")
        measured_axes = axes.twinx() if separate_axis else axes
        measured_axes.plot(*zip(*measured, strict=True), "D", ms=6, mfc="none", color="C1", mew=1.6)
        axes.plot(
            [],
            [],
            "D",
            ms=6,
            mfc="none",
            color="C1",
            mew=1.6,
            label="measured KL" + (" (right)" if separate_axis else ""),
        )
        if separate_axis:
            _log(measured_axes, [m for _, m in measured])
            measured_axes.set_ylabel("measured KL (nats a token)")
        else:
            costs += [m for _, m in measured]
    _log(axes, costs)
    axes.set_xlabel("bits a weight, scales included")
    axes.set_ylabel(f"predicted {measure} ({unit_of(measure)})")
    axes.margins(x=0.12)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def accuracy_bars(figures: Mapping[str, Any], model: str, baseline: str | None) -> Figure:
    """The exactly right answers in %, by kind of question and in all, with 95 % intervals, beside the original's.

    figures: of ``qkit.evaluation.image_text.evaluate_image_text``.
    """
    with FIGURES:
        from matplotlib.figure import Figure

    rows = {**{kind: entry["accuracy"] for kind, entry in figures["kinds"].items()}, "all": figures["accuracy"]}
    figure = Figure(figsize=(2.2 + 0.75 * min(max(len(rows), 6), 40), 3.6), layout="constrained")
    axes = figure.subplots()
    percents = [r["percent"] for r in rows.values()]
    margins = [[abs(r["percent"] - r["ci"][end]) for r in rows.values()] for end in (0, 1)]
    width = 0.38 if baseline else 0.6
    positions = [i + (width / 2 if baseline else 0) for i in range(len(rows))]
    if baseline:
        before = [r["baseline_percent"] for r in rows.values()]
        axes.bar([i - width / 2 for i in range(len(rows))], before, width, color=_GREY, label=baseline)
    axes.bar(positions, percents, width, color="C0", label=model, yerr=margins, capsize=3, ecolor="0.3")
    turn = 30 if max(map(len, rows)) > 9 else 0
    axes.set_xticks(range(len(rows)), list(rows), fontsize=9, rotation=turn, parse_math=False)
    axes.set_ylim(0, 105)
    axes.set_ylabel("exactly right, %")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _log(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis; with a short linear part down to zero where values need it."""
    positive = [v for v in values if v > 0]
    if not positive:
        return
    if min(values) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=min(positive), linscale=1.0)
        axes.set_ylim(bottom=-0.3 * min(positive))  # room for the markers at zero


def _colours(profile: Profile) -> dict[str, tuple[float, float, float, float]]:
    """By candidate: the fewer bytes the brighter; grey for what stays as it is."""
    with FIGURES:
        from matplotlib import colormaps

    def size(name: str) -> float:
        having: list[UnitProfile] = [u for u in profile.units if name in u.choices]
        return sum(u.choices[name].bytes for u in having) / max(sum(u.weights for u in having), 1)

    names = sorted((n for n in profile.candidates if n != "keep"), key=size, reverse=True)
    step = 0.9 / max(len(names) - 1, 1)
    colours = {n: colormaps["viridis"](i * step) for i, n in enumerate(names)}
    return {**colours, "keep": (0.6, 0.6, 0.6, 1.0)}
