"""The figure of times against the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qkit.system.extras import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PANELS = 24


def time_figure(products: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure with a panel per product (format and shape): cold times against rows, a line per contender, and the floor
    of qkit's.

    products: of ``products.product_record``. Whiskers go from p20 to p80; what was refused has no point.
    """
    with needs("a figure", "report"):
        from matplotlib.figure import Figure

    shown = products[:_MOST_PANELS]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(1.0 + 4.2 * across, 1.2 + 3.1 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    names = list(dict.fromkeys(r["contender"] for p in shown for r in p["results"]))
    for axes, product in zip(panels, shown, strict=False):
        for i, name in enumerate(names):
            timed = [r for r in product["results"] if r["contender"] == name and r["cold"] is not None]
            rows = [r["rows"] for r in timed]
            middle = [1e3 * r["cold"]["p50"] for r in timed]
            ends = [
                [1e3 * (r["cold"]["p50"] - r["cold"]["p20"]) for r in timed],
                [1e3 * (r["cold"]["p80"] - r["cold"]["p50"]) for r in timed],
            ]
            style = {"linewidth": 2.2, "zorder": 3} if i == 0 else {"linewidth": 1.2}
            axes.errorbar(rows, middle, yerr=ends, marker="o", ms=3.5, color=f"C{i % 10}", **style)
        floor = {r["rows"]: 1e3 * r["floor"] for r in product["results"] if r["contender"] == names[0]}
        axes.plot(list(floor), list(floor.values()), "--", color="0.4", linewidth=1.2)
        axes.set_title(f"{product['format']}, {product['out']} x {product['in']}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(floor), [str(r) for r in floor], fontsize=8)
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.margins(x=0.1)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for i, name in enumerate(names):
        panels[0].plot([], [], "o-", ms=3.5, color=f"C{i % 10}", linewidth=2.2 if i == 0 else 1.2, label=name)
    panels[0].plot([], [], "--", color="0.4", linewidth=1.2, label=f"floor of {names[0]}: bytes over bandwidth")
    for axes in panels[(down - 1) * across :]:
        axes.set_xlabel("rows of activations")
    for axes in panels[::across]:
        axes.set_ylabel("ms, weights from memory")
    figure.legend(loc="outside upper center", ncols=min(3, len(names) + 1), frameon=False, fontsize=8)
    return figure
