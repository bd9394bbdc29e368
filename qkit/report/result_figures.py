"""Figures of finished results: quality against size, divergence by position, and a map of the layers.

They are narrow enough to be read on a telephone, where a page shows them at their own size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.report.figures import FIGURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 4.4  # inches
_SMALL = 8  # points
_LETTERS = 28  # of a name
_OFFSETS = ((6, 3), (6, -9), (-6, 3), (-6, -9), (6, 12), (-6, 12), (6, -18), (-6, -18))  # of a name from its mark
Point = tuple[str, float, float, tuple[float, float] | None]  # name, x, y, ends of its interval


def size_plot(panels: Mapping[str, Sequence[Point]], baselines: Mapping[str, float], baseline: str) -> Figure:
    """Quality against the size in MB: a panel for each measure {name: points}, with the baseline's value where it has one."""
    with FIGURES:
        from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.5 + 2.3 * len(panels)), layout="constrained")
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, points) in zip(every, panels.items(), strict=True):
        for i, (_, x, y, ends) in enumerate(points):
            spread = None if ends is None else [[max(0.0, y - ends[0])], [max(0.0, ends[1] - y)]]
            axes.errorbar([x], [y], yerr=spread, fmt="o", ms=5, capsize=2.5, color=f"C{i % 10}")
        if name in baselines:
            axes.axhline(baselines[name], color="0.5", linewidth=1, linestyle="--")
            at = (0.01, baselines[name])
            axes.annotate(
                baseline,
                at,
                (0, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=_SMALL,
                color="0.4",
                parse_math=False,
            )
        values = [y for _, _, y, _ in points]
        if min(values) > 0 and max(values) > 4 * min(values):
            axes.set_yscale("log")
        axes.set_ylabel(name, fontsize=_SMALL + 1)
        axes.tick_params(labelsize=_SMALL)
        axes.margins(x=0.2, y=0.25)
        axes.grid(alpha=0.25, linewidth=0.5)
        _name_points(figure, axes, points)
    every[-1].set_xlabel("weight files, MB", fontsize=_SMALL + 1)
    return figure


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """A name beside each mark, where no other name stands."""
    taken: list[Any] = []
    figure.canvas.draw()  # the axes have their place
    low, high = axes.get_xlim()
    for name, x, y, _ in points:
        is_right = x > (low + high) / 2  # of the middle: the name stands to the left, or it would leave the figure
        offsets = sorted(_OFFSETS, key=lambda offset: (offset[0] > 0) == is_right)
        for offset in offsets:
            text = axes.annotate(
                name if len(name) <= _LETTERS else f"{name[: _LETTERS - 2]}..",
                (x, y),
                offset,
                textcoords="offset points",
                ha="left" if offset[0] > 0 else "right",
                fontsize=_SMALL,
                parse_math=False,
                in_layout=False,  # the axes keep the place that the boxes are measured in
            )
            box = text.get_window_extent()
            if offset == offsets[-1] or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def position_plot(lines: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """The KL divergence against the position in a long text, {file: [(last position of a range, mean)]}."""
    with FIGURES:
        from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 2.9), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        axes.plot(*zip(*values, strict=True), "o-", ms=3.5, label=name)
    if all(value > 0 for values in lines.values() for _, value in values):
        axes.set_yscale("log")
    axes.set_xlabel("position in the text, tokens", fontsize=_SMALL + 1)
    axes.set_ylabel("KL, nats a token", fontsize=_SMALL + 1)
    axes.tick_params(labelsize=_SMALL, which="both")
    axes.grid(alpha=0.25, linewidth=0.5)
    legend = figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=_SMALL)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def layer_map(values: Mapping[str, float], label: str, logarithmic: bool) -> Figure:
    """A value of every layer as a colour: a row for each block, a column for each kind of layer; the mean of experts."""
    import numpy as np

    with FIGURES:
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.figure import Figure

    cells: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        if not logarithmic or value > 0:
            cells.setdefault(place(name), []).append(value)
    blocks, kinds = (list(dict.fromkeys(key[i] for key in map(place, values))) for i in (0, 1))
    grid = np.full((len(blocks), len(kinds)), np.nan)
    for (block, kind), found in cells.items():
        grid[blocks.index(block), kinds.index(kind)] = sum(found) / len(found)
    low, high = (float(np.nanmin(grid)), float(np.nanmax(grid))) if cells else (1.0, 2.0)
    if not low < high:  # a scale needs two ends
        low, high = low / 2, high * 2
    norm = LogNorm(low, high) if logarithmic else Normalize(low, high)
    figure = Figure(figsize=(_WIDTH, 1.3 + 0.17 * max(len(blocks), 6)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(np.ma.masked_invalid(grid), norm=norm, cmap="viridis", aspect="auto")
    step = math.ceil(len(blocks) / 40)
    axes.set_yticks(range(0, len(blocks), step), blocks[::step], fontsize=_SMALL - 1, parse_math=False)
    axes.set_xticks(range(len(kinds)), kinds, fontsize=_SMALL, rotation=45, ha="right", parse_math=False)
    axes.set_ylabel("block", fontsize=_SMALL + 1)
    bar = figure.colorbar(drawn, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=_SMALL + 1)
    bar.ax.tick_params(labelsize=_SMALL, which="both")
    return figure


def place(name: str) -> tuple[str, str]:
    """(block, kind) of a layer by its name: 'model.layers.3.mlp.up_proj' -> ('3', 'up'); ('-', kind) outside the blocks."""
    found = re.match(r"(?:.*?\.)?(\d+)\.", name)
    kind = name.rpartition(".")[2].removesuffix("_proj")
    return (found[1] if found else "-"), kind
