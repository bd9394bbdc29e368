"""The tables of ``qkit eval --suite``: first the figures that decide, a row per file; then all figures, a column per file.

On a screen both are narrower than 100 columns where names are short: more than two files make more tables of the second kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from qkit.commands.common import megabytes
from qkit.commands.grid import Grid, interval, printable, wide_table

FILES = 2  # of a table of all figures, on a screen

Figures = Mapping[str, Any]


def suite_grids(measured: Sequence[Figures], files: int = FILES) -> list[Grid]:
    """The tables of models that were measured with the suite, so many files in each table of all figures."""
    parts = [measured[i : i + files] for i in range(0, len(measured), files)]
    return [_deciding(measured), *map(_everything, parts)]


def suite_notes(measured: Figures) -> Iterator[str]:
    """What a reader of the tables has to know, a sentence each."""
    suite = measured["suite"]
    if not suite["chat"]["template"]:
        yield "the model has no chat template: its answers are continuations of the prompts as plain text"
    if suite["long_context"] is None:
        yield "long context: left out, since no text is long enough: add --text FILE"
    if "tasks" not in measured:
        yield "tasks: left out, since lm-eval is not installed: pip install 'qkit[eval]'"


def _deciding(measured: Sequence[Figures]) -> Grid:
    text = next(iter(measured[0]["texts"]))
    chat = measured[0]["suite"]["chat"]
    title = (
        f"against {printable(measured[0]['baseline'])}: text '{printable(text)}', and {chat['prompts']} chat answers of "
        f"{chat['agreement']['of']:.0f} tokens"
    )
    columns = ("recovery % (95 % ci)", "KL text", "KL chat", "top-1 %", "flips %", "same tokens")
    grid = wide_table("model", "size", *columns, title=title)
    for model in measured:
        entry, chat = model["texts"][text], model["suite"]["chat"]
        grid.add_row(
            *map(
                Text,
                (
                    printable(model["model"]),
                    megabytes(model["size"]["bytes"]),
                    _of(entry["recovery"], "percent", ".1f"),
                    f"{entry['kl']['mean']:{_kl_form(entry['kl']['mean'])}}",
                    f"{chat['kl']['mean']:{_kl_form(chat['kl']['mean'])}}",
                    f"{100 * entry['same_top1']:.1f}",
                    f"{entry['flips']['percent']:.1f}",
                    f"{chat['agreement']['tokens']:.1f}",
                ),
            )
        )
    return grid


def _everything(measured: Sequence[Figures]) -> Grid:
    names = (printable(measured[0]["baseline"]), *(printable(m["model"]) for m in measured))
    grid = wide_table("figure (95 % ci)", *names, title="all figures")
    columns = [list(_rows(model)) for model in measured]
    for cells in zip(*columns, strict=True):
        figure, baseline, _ = cells[0]
        grid.add_row(*map(Text, (figure, baseline, *(value for _, _, value in cells))))
    return grid


def _rows(model: Figures) -> Iterator[tuple[str, str, str]]:
    """(figure, value of the baseline, value) of one file."""
    suite = model["suite"]
    yield "size", megabytes(model["size"]["baseline_bytes"]), megabytes(model["size"]["bytes"])
    for name, entry in model["texts"].items():
        yield f"{printable(name)}: perplexity", f"{entry['baseline_perplexity']:.2f}", _of(entry, "perplexity", ".2f")
        yield from ((figure, "", value) for figure, value in _text_rows(printable(name), entry))
    yield from ((figure, "", value) for figure, value in _chat_rows(suite["chat"]))
    long = suite["long_context"]
    for bucket in [] if long is None else long["buckets"]:
        where = f"tokens {bucket['from']:,} to {bucket['to']:,}"
        yield f"KL at {where}", "", f"{bucket['kl']:{_kl_form(bucket['kl'])}}"
    for task, entry in model.get("tasks", {}).items():
        yield from _task_rows(printable(task), entry["metrics"], model["baseline_tasks"][task]["metrics"])
    yield "seconds of passes", f"{suite['baseline_seconds']:.0f}", f"{suite['seconds']:.0f}"


def _text_rows(name: str, entry: Figures) -> Iterator[tuple[str, str]]:
    kl, flips = entry["kl"], entry["flips"]
    yield f"{name}: recovery, %", _of(entry["recovery"], "percent", ".1f")
    yield f"{name}: KL mean", _of(kl, "mean", _kl_form(kl["mean"]))
    yield f"{name}: KL 99 %, 99.9 %", f"{kl['p99']:.3f}, {kl['p999']:.3f}"
    yield f"{name}: same top-1, %", _percent(entry["same_top1"], entry["same_top1_ci"])
    yield f"{name}: flips, %", _of(flips, "percent", ".2f")
    yield f"{name}: lost, gained, %", f"{flips['lost']:.2f}, {flips['gained']:.2f}"


def _chat_rows(chat: Figures) -> Iterator[tuple[str, str]]:
    kl, same = chat["kl"], chat["agreement"]
    yield "chat: KL mean", _of(kl, "mean", _kl_form(kl["mean"]))
    yield "chat: KL 99 %, 99.9 %", f"{kl['p99']:.3f}, {kl['p999']:.3f}"
    yield "chat: same top-1, %", _percent(chat["same_top1"], chat["same_top1_ci"])
    yield "chat: same tokens", _of(same, "tokens", ".1f")
    yield "chat: same answers", f"{same['whole']} of {chat['prompts']}"


def _task_rows(task: str, metrics: Figures, before: Figures) -> Iterator[tuple[str, str, str]]:
    for name, entry in metrics.items():
        what = f"{task}: {printable(name)}"
        yield what, f"{before[name]['value']:.4g}" if name in before else "", f"{entry['value']:.4g}"
        if "change" in entry:
            yield f"{what}, change", "", _with_interval(entry["change"], entry["change_ci"], "+.3f")
        if "flips" in entry:
            yield f"{what}, flips, %", "", _percent(entry["flips"], entry["flips_ci"])


def _kl_form(value: float) -> str:
    """Files of 8 bits are so near that four places would be zeros."""
    return ".1e" if 0 < value < 0.001 else ".4f"


def _of(entry: Figures, name: str, form: str) -> str:
    return _with_interval(entry[name], entry["ci"], form)


def _percent(share: float, ends: Sequence[float]) -> str:
    return _with_interval(100 * share, [100 * end for end in ends], ".1f")


def _with_interval(value: float, ends: Sequence[float | None], form: str) -> str:
    """ends: None in a file of JSON, which cannot say NaN"""
    return f"{value:{form}} {interval([math.nan if end is None else end for end in ends], form)}".rstrip()
