"""The results of ``measure``, as tables and as JSON: shared by eval, check and demo."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from qkit.commands.bars import Bar
from qkit.commands.common import megabytes
from qkit.commands.grid import Grid, interval, print_wide, printable, wide_table
from qkit.commands.row_tables import rows_table
from qkit.commands.suite_tables import suite_grids, suite_notes
from qkit.errors import NumericFailure
from qkit.evaluation.request import jsonable


def json_bytes(value: Any) -> bytes:
    return (json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n").encode()


@contextmanager
def progress_bar(console: Console, parts: int = 1) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar with parts of equal length on a terminal, from the third second on; nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    bar, begun = Bar(console), list[str]()

    def advance(name: str, done: int, total: int) -> None:
        if name not in begun:
            begun.append(name)
        bar.show((begun.index(name) + done / max(total, 1)) / max(parts, len(begun)), printable(name))

    try:
        yield advance
    finally:
        bar.stop()


def show(measured: Mapping[str, Any], console: Console) -> None:
    """Prints the tables of one model."""
    show_all([measured], console)


def show_all(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints the tables of several models."""
    for grid in grids(found):
        print_wide(console, grid)
    for note in notes(found):
        console.print(Text(f"note: {note}"), soft_wrap=True)


def page_tables(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same tables for a page, {"title", "columns", "rows"} each; a page is wide enough for all files side by side."""
    suite = bool(measured) and "suite" in measured[0]
    found = suite_grids(measured, len(measured)) if suite else grids(measured)
    return [{"title": g.title, "columns": g.columns, "rows": g.plain()} for g in found]


def notes(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the tables has to know."""
    return [*suite_notes(measured[0])] if measured and "suite" in measured[0] else []


def grids(measured: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """The tables of one model, or one table for all models of each text, and one of the tasks; of the suite its own."""
    if not measured:
        return []
    if "suite" in measured[0]:
        return suite_grids(measured)
    if len(measured) == 1:
        return _grids(measured[0])
    made = [models_table(name, measured) for name in measured[0].get("texts", {})]
    made += [rows_table(name, measured) for name in measured[0].get("rows", {})]
    if measured[0].get("tasks"):
        made.append(_tasks_of_all(measured))
    return made


def _grids(measured: Mapping[str, Any]) -> list[Grid]:
    tables = []
    if measured.get("texts"):
        tables.append(texts_table(measured["texts"]))
    tables += [rows_table(name, [measured]) for name in measured.get("rows", {})]
    tables += [caches_table(text, caches) for text, caches in measured.get("caches", {}).items()]
    tables += [retrieval_table(text, caches) for text, caches in measured.get("retrieval", {}).items()]
    for name, figures in measured.get("pairs", {}).items():
        tables += [accuracy_table(name, figures), answers_table(name, figures)]
    if "videos" in measured:
        tables.append(videos_table(measured["videos"]))
    if measured.get("tasks"):
        tables.append(tasks_table(measured["tasks"], measured.get("baseline_tasks", {})))
    return tables


def refuse_unmeasured(outs: Sequence[str], found: Sequence[Mapping[str, Any]]) -> None:
    """Raises NumericFailure for a figure that is not finite, after the figures were shown and written."""
    for out, measured in zip(outs, found, strict=True):
        bad = unfinite(measured)
        if bad:
            raise NumericFailure(
                f"{printable(out)}: {len(bad)} measured figures are not finite numbers, first {printable(bad[0])}: the "
                f"model computes NaN or infinity: run 'qkit verify {printable(out)}', and quantize again from a sound source"
            )


def unfinite(measured: Any, where: str = "") -> list[str]:
    """Names of figures that are not finite, as in the JSON. Ends of intervals are none, since one window has no spread; nor is
    the infinite ratio of signal to noise of samples that are equal."""
    if isinstance(measured, Mapping):
        return [
            bad
            for key, value in measured.items()
            if key not in ("ci", "stderr", "psnr") and not str(key).endswith("_ci")
            for bad in unfinite(value, f"{where}.{key}" if where else str(key))
        ]
    if isinstance(measured, (list, tuple)):
        # Of [value, low, high] the first is the figure.
        return unfinite(measured[0], where) if measured and isinstance(measured[0], float) else []
    return [where] if isinstance(measured, float) and not math.isfinite(measured) else []


def models_table(text: str, measured: Sequence[Mapping[str, Any]]) -> Grid:
    """A row per model, below that of the baseline where there is one."""
    first = measured[0]["texts"][text]
    paired = "kl" in first
    extra = ("change % (95 % ci)", "KL mean", "KL p99", "same top-1") if paired else ()
    title = f"{printable(text)}, {first['windows']} windows of {measured[0]['window']}"
    grid = wide_table("model", "size", "perplexity (95 % ci)", *extra, title=title)
    if paired:
        size = megabytes(measured[0]["size"]["baseline_bytes"])
        value = f"{first['baseline_perplexity']:.2f} {interval(first['baseline_ci'], '.2f')}"
        grid.add_row(*map(Text, (printable(measured[0]["baseline"]), size, value, "", "", "", "")))
    for model in measured:
        entry = model["texts"][text]
        cells = [printable(model["model"]), megabytes(model["size"]["bytes"])]
        cells.append(f"{entry['perplexity']:.2f} {interval(entry['ci'], '.2f')}")
        if paired:
            cells.append(f"{entry['change_percent']:+.2f} {interval(entry['change_ci'], '+.2f')}")
            cells += [f"{entry['kl']['mean']:.4g}", f"{entry['kl']['p99']:.4g}", f"{entry['same_top1']:.4f}"]
        grid.add_row(*map(Text, cells))
    return grid


def _tasks_of_all(found: Sequence[Mapping[str, Any]]) -> Grid:
    """The rows of ``tasks_table`` of every model, with its name before them."""
    parts = [(m["model"], tasks_table(m["tasks"], m.get("baseline_tasks", {}))) for m in found]
    grid = wide_table("model", *parts[0][1].columns, title="tasks")
    for name, part in parts:
        for cells in part.rows:
            grid.add_row(Text(printable(name)), *cells)
    return grid


def caches_table(text: str, caches: Mapping[str, Mapping[str, Any]]) -> Grid:
    """A row per cache: perplexity by decoding, and the final bytes of a sequence."""
    columns = ("KV cache", "perplexity", "change % (95 % ci)", "same greedy", "kB", "of 16 bits")
    table = wide_table(*columns, title=f"decoding {printable(text)}")
    for name, entry in caches.items():
        change = (
            f"{entry['change_percent']:+.2f} {interval(entry['change_ci'], '+.2f')}" if "change_ci" in entry else ""
        )
        cells = [name, f"{entry['perplexity']:.2f}", change, f"{entry['same_greedy']:.1f}"]
        table.add_row(*map(Text, [*cells, f"{entry['bytes'] / 1e3:,.0f}", f"{entry['share']:.3f}"]))
    return table


def retrieval_table(text: str, caches: Mapping[str, Sequence[Mapping[str, Any]]]) -> Grid:
    """A row per cache, task, length and depth."""
    choices = next(iter(caches.values()))[0]["choices"]
    best = f"best of {choices} % (chance {100 / choices:.1f})"
    columns = ("KV cache", "of 16 bits", "task", "tokens", "depth", "nats/token", "gain (95 % ci)", "exact %", best)
    table = wide_table(*columns, title=f"retrieval from {printable(text)}")
    for name, rows in caches.items():
        for row in rows:
            gain = f"{row['gain']:+.2f} {interval(row['gain_ci'], '+.2f')}"
            cells = [name, f"{row['share']:.3f}", row["task"], f"{row['length']:,}", f"{row['depth']:.2f}"]
            cells += [f"{row['nll']:.2f}", gain, f"{100 * row['exact']:.0f}", f"{100 * row['best']:.0f}"]
            table.add_row(*map(Text, cells))
    return table


def accuracy_table(name: str, figures: Mapping[str, Any]) -> Grid:
    """A row per kind of question, and one of all."""
    paired = "baseline_percent" in figures["accuracy"]
    extra = ("baseline", "change (95 % ci)") if paired else ()
    title = f"exactly right answers, {printable(name)}"
    table = wide_table("kind", "questions", "right % (95 % ci)", *extra, title=title)
    for kind, entry in [*figures["kinds"].items(), ("all", figures)]:
        accuracy = entry["accuracy"]
        cells = [
            printable(kind),
            str(entry["questions"]),
            f"{accuracy['percent']:.1f} {interval(accuracy['ci'], '.1f')}",
        ]
        if paired:
            change = f"{accuracy['change']:+.1f} {interval(accuracy['change_ci'], '+.1f')}"
            cells += [f"{accuracy['baseline_percent']:.1f}", change]
        table.add_row(*map(Text, cells))
    return table


def answers_table(name: str, figures: Mapping[str, Any]) -> Grid:
    """Figures from the likelihoods of the right answers; with a baseline also the errors of hidden states."""
    rows = {"perplexity (95 % ci)": f"{figures['perplexity']:.4f} {interval(figures['ci'], '.4f')}"}
    if "kl" in figures:
        kl = figures["kl"]
        rows |= {
            "baseline": f"{figures['baseline_perplexity']:.4f} {interval(figures['baseline_ci'], '.4f')}",
            "change %": f"{figures['change_percent']:+.2f} {interval(figures['change_ci'], '+.2f')}",
            "KL mean": f"{kl['mean']:.4g} {interval(kl['ci'], '.4g')}",
            "KL p99": f"{kl['p99']:.4g}",
            "same top-1": f"{figures['same_top1']:.4f}",
        }
        for kind, error in figures["errors"].items():
            rows[f"error of hidden states, {kind} tokens"] = f"{error['mean']:.4g} {interval(error['ci'], '.4g')}"
    table = wide_table("answer tokens", str(figures["tokens"]), title=f"answers, {printable(name)}")
    for what, value in rows.items():
        table.add_row(Text(what), Text(value))
    return table


def videos_table(figures: Mapping[str, Any]) -> Grid:
    """A row per figure with its interval."""
    table = wide_table("figure", "value (95 % ci)", title=f"{figures['videos']} samples")
    units = {
        "psnr": "PSNR, dB",
        "ssim": "SSIM",
        "latent_error": "error of latents, last step",
        "width": "bits of inputs",
    }
    for key, value in figures.items():
        name = units.get(key, key.replace("_", " "))
        if isinstance(value, list) and key not in ("latent_errors", "bits", "skips"):
            table.add_row(name, Text(f"{value[0]:.4g} {interval(value[1:], '.4g')}"))
        elif isinstance(value, (int, float)) and key != "videos":
            table.add_row(name, f"{value:.4g}")
    return table


def texts_table(texts: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Columns without a baseline: the first three."""
    paired = any("kl" in entry for entry in texts.values())
    extra = ("baseline", "change %", "KL mean", "KL p99", "same top-1") if paired else ()
    table = wide_table("text", "perplexity (95 % ci)", "windows", *extra, title="texts")
    for name, entry in texts.items():
        cells = [printable(name), f"{entry['perplexity']:.2f} {interval(entry['ci'], '.2f')}", str(entry["windows"])]
        if paired:
            cells += [
                f"{entry['baseline_perplexity']:.2f}",
                f"{entry['change_percent']:+.2f} {interval(entry['change_ci'], '+.2f')}",
                f"{entry['kl']['mean']:.4g}",
                f"{entry['kl']['p99']:.4g}",
                f"{entry['same_top1']:.4f}",
            ]
        table.add_row(*map(Text, cells))
    return table


def tasks_table(tasks: Mapping[str, Any], baseline: Mapping[str, Any]) -> Grid:
    extra = ("baseline", "change (95 % ci)") if baseline else ()
    table = wide_table("task", "metric", "value (95 % ci)", "samples", *extra, title="tasks")
    for task, entry in tasks.items():
        for metric, figures in entry["metrics"].items():
            value = f"{figures['value']:.4g}" + (f" {interval(figures['ci'], '.4g')}" if figures["ci"] else "")
            cells = [printable(task), printable(metric), value, str(entry["samples"])]
            if baseline:
                before = baseline.get(task, {}).get("metrics", {}).get(metric)
                cells.append("" if before is None else f"{before['value']:.4g}")
                paired = "change" in figures
                cells.append(f"{figures['change']:+.4g} {interval(figures['change_ci'], '+.4g')}" if paired else "")
            table.add_row(*map(Text, cells))
    return table
