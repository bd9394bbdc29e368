"""The tables of ``qkit eval --suite``: first the figures that decide, a row per file; then all figures, a column per file.

Both are narrower than 100 columns, with names of up to 16 letters; more files make more tables of the second kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.text import Text

from qkit.commands.common import megabytes
from qkit.commands.grid import Grid, interval, printable, wide_table

_FILES = 3  # of a table of all figures

Figures = Mapping[str, Any]


def suite_grids(measured: Sequence[Figures]) -> list[Grid]:
    """The tables of models that were measured with the suite."""
    parts = [measured[i : i + _FILES] for i in range(0, len(measured), _FILES)]
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
    yield f"passes of the baseline, once for all files: {suite['baseline_seconds']:.0f} s"


def _deciding(measured: Sequence[Figures]) -> Grid:
    text = next(iter(measured[0]["texts"]))
    chat = measured[0]["suite"]["chat"]
    title = f"against {printable(measured[0]['baseline'])}, on {printable(text)} and on {chat['prompts']} answers"
    columns = ("recovery % (95 % ci)", "KL text", "KL chat", "same top-1 %", "flips %")
    grid = wide_table("model", "size", *columns, f"same of {chat['agreement']['of']:.0f} tokens", title=title)
    for model in measured:
        entry, chat = model["texts"][text], model["suite"]["chat"]
        grid.add_row(
            *map(
                Text,
                (
                    printable(model["model"]),
                    megabytes(model["size"]["bytes"]),
                    _with_interval(entry["recovery"]["percent"], entry["recovery"]["ci"], ".1f"),
                    f"{entry['kl']['mean']:.4f}",
                    f"{chat['kl']['mean']:.4f}",
                    f"{100 * entry['same_top1']:.1f}",
                    f"{entry['flips']['percent']:.1f}",
                    f"{chat['agreement']['tokens']:.1f}",
                ),
            )
        )
    return grid


def _everything(measured: Sequence[Figures]) -> Grid:
    grid = wide_table("figure (95 % ci)", *(printable(m["model"]) for m in measured), title="all figures")
    columns = [list(_rows(model)) for model in measured]
    for cells in zip(*columns, strict=True):
        grid.add_row(Text(cells[0][0]), *(Text(value) for _, value in cells))
    return grid


def _rows(model: Figures) -> Iterator[tuple[str, str]]:
    """(figure, value) of one file."""
    suite = model["suite"]
    texts = (_text_rows(printable(name), entry) for name, entry in model["texts"].items())
    yield "size, and of the baseline", " of ".join(megabytes(model["size"][k]) for k in ("bytes", "baseline_bytes"))
    yield from chain.from_iterable(texts)
    yield from _chat_rows(suite["chat"])
    long = suite["long_context"]
    for bucket in [] if long is None else long["buckets"]:
        where = f"tokens {bucket['from']:,} to {bucket['to']:,}"
        yield f"KL at {where}", f"{bucket['kl']:.4f}"
    for task, entry in model.get("tasks", {}).items():
        yield from _task_rows(printable(task), entry["metrics"], model["baseline_tasks"][task]["metrics"])
    yield "seconds of its passes", f"{suite['seconds']:.0f}"


def _text_rows(name: str, entry: Figures) -> Iterator[tuple[str, str]]:
    kl, flips = entry["kl"], entry["flips"]
    yield f"{name}: perplexity", _with_interval(entry["perplexity"], entry["ci"], ".2f")
    yield f"{name}: of the baseline", _with_interval(entry["baseline_perplexity"], entry["baseline_ci"], ".2f")
    yield f"{name}: recovery, %", _with_interval(entry["recovery"]["percent"], entry["recovery"]["ci"], ".1f")
    yield f"{name}: KL mean", _with_interval(kl["mean"], kl["ci"], ".4f")
    yield f"{name}: KL 99 %, 99.9 %", f"{kl['p99']:.3f}, {kl['p999']:.3f}"
    yield f"{name}: same top-1, %", _percent(entry["same_top1"], entry["same_top1_ci"])
    yield f"{name}: flips, %", _with_interval(flips["percent"], flips["ci"], ".2f")
    yield f"{name}: lost, gained, %", f"{flips['lost']:.2f}, {flips['gained']:.2f}"


def _chat_rows(chat: Figures) -> Iterator[tuple[str, str]]:
    kl, same = chat["kl"], chat["agreement"]
    yield "chat: KL mean", _with_interval(kl["mean"], kl["ci"], ".4f")
    yield "chat: KL 99 %, 99.9 %", f"{kl['p99']:.3f}, {kl['p999']:.3f}"
    yield "chat: same top-1, %", _percent(chat["same_top1"], chat["same_top1_ci"])
    yield "chat: same tokens", _with_interval(same["tokens"], same["ci"], ".1f")
    yield "chat: same answers", f"{same['whole']} of {chat['prompts']}"


def _task_rows(task: str, metrics: Figures, before: Figures) -> Iterator[tuple[str, str]]:
    for name, entry in metrics.items():
        what = f"{task}: {printable(name)}"
        yield what, f"{entry['value']:.4g}"
        yield f"{what}, of the baseline", f"{before[name]['value']:.4g}" if name in before else ""
        yield (
            f"{what}, change",
            _with_interval(entry["change"], entry["change_ci"], "+.3f") if "change" in entry else "",
        )
        yield f"{what}, flips, %", _percent(entry["flips"], entry["flips_ci"]) if "flips" in entry else ""


def _percent(share: float, ends: Sequence[float]) -> str:
    return _with_interval(100 * share, [100 * end for end in ends], ".1f")


def _with_interval(value: float, ends: Sequence[float], form: str) -> str:
    return f"{value:{form}} {interval([*ends], form)}".rstrip()
