"""Tables of models that do not continue a text: a row for each model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from qkit.commands.common import megabytes
from qkit.commands.grid import Grid, interval, printable, wide_table

_WHAT = {
    "embeddings": "embeddings",
    "classes": "classes",
    "labels": "labels",
    "scores": "scores",
    "tokens": "tokens",
    "masked": "masked tokens",
    "pairs": "tokens that are written",
}


def rows_table(name: str, measured: Sequence[Mapping[str, Any]]) -> Grid:
    """One row for each model, with the figures that its kind has."""
    first = measured[0]["rows"][name]
    cells = [dict(_cells(m["rows"][name])) for m in measured]
    cut = f", {first['cut']} cut" if first["cut"] else ""
    pooling = f", pooled by {first['pooling']}" if "pooling" in first else ""
    title = f"{printable(name)}, {_WHAT[first['kind']]} of {first['rows']} rows{cut}{pooling}"
    table = wide_table("model", "size", *cells[0], title=title)
    for model, values in zip(measured, cells, strict=True):
        table.add_row(*map(Text, (printable(model["model"]), megabytes(model["size"]["bytes"]), *values.values())))
    return table


def _cells(f: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(column, cell) of the figures that are there."""
    if "cosine" in f:
        yield "cosine (95 % ci)", f"{f['cosine']['mean']:.5f} {interval(f['cosine']['ci'], '.5f')}"
        yield "lowest 1 %", f"{f['cosine']['p1']:.5f}"
    for key, column in (("same_nearest", "same nearest row"), ("same_class", "same class")):
        if key in f:
            yield f"{column} (95 % ci)", f"{f[key]['share']:.4f} {interval(f[key]['ci'], '.4f')}"
    if "similarities" in f:
        yield "correlation of similarities", f"{f['similarities']:.5f}"
    if "rank_correlation" in f:
        yield "correlation", f"{f['correlation']:.5f}"
        yield "of ranks", f"{f['rank_correlation']:.5f}"
        yield "same order", f"{f['same_order']:.4f}"
        yield "mean error (of a spread)", f"{f['error']:.4g} ({f['spread']:.4g})"
    if "perplexity" in f:
        yield "perplexity (95 % ci)", f"{f['perplexity']:.2f} {interval(f['ci'], '.2f')}"
    if "change_percent" in f:
        yield "baseline", f"{f['baseline_perplexity']:.2f}"
        yield "change % (95 % ci)", f"{f['change_percent']:+.2f} {interval(f['change_ci'], '+.2f')}"
    if "kl" in f:
        yield "KL mean", f"{f['kl']['mean']:.4g}"
        yield "KL p99", f"{f['kl']['p99']:.4g}"
    if "same_top1" in f:
        yield "same top-1", f"{f['same_top1']:.4f}"
    for key, column in (("accuracy", "right"), ("preferred", "chosen first")):
        if key in f:
            share = f[key]
            yield f"{column} % (95 % ci)", f"{share['percent']:.1f} {interval(share['ci'], '.1f')}"
            if "change" in share:
                yield f"baseline, {column} %", f"{share['baseline_percent']:.1f}"
                yield "change (95 % ci)", f"{share['change']:+.1f} {interval(share['change_ci'], '+.1f')}"
