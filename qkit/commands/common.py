"""What several verbs share: the options of a request, progress, signals, tables."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qkit.allocation.allocate import parse_bytes
from qkit.errors import Stopped, UsageError
from qkit.pipeline import Prepared, coverage
from qkit.recipe import MOST_SPARSE
from qkit.request import Request
from qkit.safefile import write_atomic
from qkit.transforms.table import EFFORTS, TRANSFORMS

_SIGNALS = (
    (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGINT, signal.SIGTERM)
)


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that describe what to quantize and how."""
    options = [
        click.option("--model", required=True, help="Model folder, reference model name, or hub id."),
        click.option("--scheme", help="For instance w4a16, w8a8, nvfp4 ('qkit list schemes')."),
        click.option(
            "--method",
            help="rtn (default), gptq, awq, mbq, smoothquant, rotate, hadamard, residual, signround, auto, requant or a sum.",
        ),
        click.option("--recipe", type=click.Path(path_type=Path), help="YAML file with rules per layer."),
        click.option("--group-size", type=int, help="Weights per scale; -1: one scale per output channel."),
        click.option(
            "--option", "options", multiple=True, metavar="NAME=VALUE", help="Option of the method, repeatable."
        ),
        click.option(
            "--effort",
            type=click.Choice(list(EFFORTS)),
            help="Of signround: "
            + ", ".join(f"{name} ({o['steps']} steps)" for name, o in EFFORTS.items())
            + "; 'qkit plan' says which share of the time that is.",
        ),
        click.option(
            "--call",
            "call",
            multiple=True,
            metavar="NAME=VALUE",
            help="What a diffusion pipeline is called with, repeatable: num_inference_steps=20, height=480.",
        ),
        click.option(
            "--rows-memory",
            metavar="SIZE",
            help="Of a diffusion pipeline: memory that calibration rows may take, for instance 500MB.",
        ),
        click.option(
            "--policy",
            "policy",
            multiple=True,
            metavar="NAME=VALUE",
            help="Of --scheme 6bit, repeatable: width=5 (mean bits of inputs), skips=0.25 (blocks not run), kind=dmpq, "
            "static or decoupled, cache=delta or schedule, weigh=true.",
        ),
        click.option(
            "--outliers", type=float, help="Percent of the weights, the largest, kept in 16 bits beside the codes."
        ),
        click.option(
            "--rank", type=int, help="Of a branch in 16 bits beside the codes, fitted to what rounding took (0: none)."
        ),
        click.option(
            "--significant", type=float, help="Percent put back after quantization: what the loss depends on."
        ),
        click.option(
            "--target",
            "targets",
            multiple=True,
            metavar="PART=SCHEME",
            help="What other parts get: vision=w8a8, projector=skip (default: auto, by measuring); text_encoder=w8a16.",
        ),
        click.option("--strict", is_flag=True, help="Refuse to adapt a group size that does not divide a width."),
        click.option(
            "--export",
            type=click.Choice(["compressed-tensors", "qkit"]),
            help="Name of the method in config.json; qkit needs 'import qkit' to load (default: compressed-tensors).",
        ),
        click.option(
            "--calib",
            type=click.Path(path_type=Path),
            help="Text, pairs or prompts to calibrate on.",
        ),
        click.option("--samples", type=int, default=128, show_default=True, help="Calibration rows."),
        click.option("--seqlen", type=int, default=256, show_default=True, help="Tokens per calibration row."),
        click.option(
            "--written",
            type=int,
            default=0,
            help="Calibration rows that the model writes itself, besides --samples of the text.",
        ),
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="For what is random: rotations, rows that the model writes, the order of learning.",
        ),
        click.option("--threads", type=int, help="Workers (default: all cores); the result does not depend on it."),
        click.option("--json", "json_file", type=OutFile(), help="Write what is printed to this file."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def make_request(given: dict[str, Any]) -> Request:
    """The Request of parsed options."""
    named = {"option": "options", "call": "call", "policy": "policy"}
    options, call, policy = (_pairs(f"--{flag}", given.pop(key)) for flag, key in named.items())
    targets = [item.partition("=") for item in given.pop("targets")]
    for name, equals, value in targets:
        if not equals or not value:
            raise UsageError(f"--target {name}: expected PART=SCHEME, for instance vision=w8a8")
    if given["threads"] is not None and given["threads"] < 1:
        raise UsageError(f"--threads {given['threads']}: expected at least 1")
    for name in ("outliers", "significant"):
        if given[name] is not None and not 0 <= given[name] <= MOST_SPARSE:
            raise UsageError(f"--{name} {given[name]:g}: expected a percentage from 0 to {MOST_SPARSE:g}")
    if given["rank"] is not None and given["rank"] < 0:
        raise UsageError(f"--rank {given['rank']}: expected 0, for none, or more")
    parts = {name: value for name, _, value in targets} or None
    rows = given.pop("rows_memory")
    given["rows_memory"] = None if rows is None else parse_bytes(rows, "--rows-memory")
    return Request(options=options, call=call, policy=policy, targets=parts, **given)


def _pairs(flag: str, items: Sequence[str]) -> dict[str, Any]:
    """{name: value} of NAME=VALUE."""
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{flag} {item}: expected NAME=VALUE")
        found[name] = _literal(value)
    return found


def _literal(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


class OutFile(click.Path):
    """A file that will be written: looked at before anything is computed for it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Raises UsageError where it cannot be written."""
        file = Path(str(super().convert(value, param, ctx)))
        name = param.opts[0] if param is not None else "file"
        if file.is_dir():
            raise UsageError(f"{name} {file}: that is a folder: name a file")
        if not file.absolute().parent.is_dir():
            raise UsageError(f"{name} {file}: there is no folder {file.parent}: make it first")
        return file


class OutFolder(click.Path):
    """A folder that will be made: '.' is the folder that it means, and what can have no neighbours is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Raises UsageError for a name that no folder can have, or that other programs could not write."""
        name, text = param.opts[0] if param is not None else "folder", os.fsdecode(super().convert(value, param, ctx))
        if not text or "\0" in text:
            raise UsageError(f"{name} {text!a}: that is no name of a folder: give another")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{name} {text!a}: the name is not UTF-8: give another") from None
        folder = Path(text)
        folder = folder if folder.name not in ("", "..") else Path(os.path.abspath(text))
        if not folder.name:
            raise UsageError(f"{name} {text}: that is the root of the file system: name a folder in it")
        return folder


def write_json(file: Path | None, data: Any) -> None:
    """The machine's copy of what a command prints."""
    if file is not None:
        write_atomic(file, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def megabytes(n: float) -> str:
    """10^6 bytes, or 10^9 from 1 GB up."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def show_coverage(found: Prepared, console: Console) -> None:
    """What is quantized, what is not and why, and the bytes."""
    plan = found.plan
    kinds: dict[tuple[str, str, str, str], list[int]] = {}
    for p in plan.linears.values():
        group = str(p.weights.group or p.weights.strategy)
        acts = "-" if p.activations is None else p.activations.name
        solver = "+".join((p.solver, *(t for t in plan.transforms if TRANSFORMS[t].stage == "block")))
        entry = kinds.setdefault((p.scheme, f"{p.weights.name}, {group}", acts, solver), [0, 0])
        entry[0] += 1
        entry[1] += p.shape[0] * p.shape[1]
    table = wide_table(
        "scheme",
        "weights, group",
        "activations",
        "solver",
        "linears",
        "weights (M)",
        title="coverage",
        title_justify="left",
    )
    for (scheme, weights, acts, solver), (count, size) in kinds.items():
        table.add_row(scheme, weights, acts, solver, str(count), f"{size / 1e6:.2f}")
    print_wide(console, table)
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.skipped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(Text(f"skipped: {names[0]}{more}: {reason}"))
    notes: dict[str, list[str]] = {}
    for p in plan.linears.values():
        if p.note:
            notes.setdefault(p.note, []).append(p.name)
    for note, names in notes.items():
        console.print(
            Text(f"note: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {note}")
        )
    if plan.untied:
        console.print("note: rotation gives the head a weight of its own: the embeddings are no longer tied")
    if plan.calibration is not None and plan.calibration.written:
        c = plan.calibration
        console.print(f"calibration: {c.samples} rows, and {c.written} that the model writes, of {c.seqlen} tokens")
    done = coverage(plan)
    console.print(
        f"{done['quantized']} linears quantized, {done['skipped']} skipped; tensors: {megabytes(plan.source_bytes)} before, "
        f"{megabytes(plan.packed_bytes)} after ({plan.packed_bytes / plan.source_bytes:.3f}x)"
    )


class Reporter:
    """Progress on a terminal, plain lines elsewhere; also where a signal stops the run."""

    def __init__(self, console: Console, resume: str) -> None:
        self._resume = resume
        self._stop: int | None = None
        self._live = console.is_terminal
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not self._live)
        self._task: TaskID | None = None
        self._last = time.monotonic()

    def start(self, what: str, total: int) -> None:
        """A new phase."""
        self._check()
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total)
        if not self._live and time.monotonic() - self._last > 2:
            self._last = time.monotonic()
            self._console.print(Text(what))

    def step(self, amount: int = 1) -> None:
        """Some of the phase is done; a signal that came in takes effect here."""
        self._check()
        if self._task is not None:
            self._progress.advance(self._task, amount)

    def _check(self) -> None:
        if self._stop is not None:
            name = signal.Signals(self._stop).name
            raise Stopped(f"stopped by {name}; what was finished is kept: go on with: {self._resume}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Signals stop the run at the next safe place; a second one ends the process at once."""

        def note(number: int, _: FrameType | None) -> None:
            self._stop = number
            for s in _SIGNALS:
                signal.signal(s, signal.SIG_DFL)

        before = {s: signal.signal(s, note) for s in _SIGNALS}
        try:
            with self._progress:
                yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def wide_table(*columns: str, **options: Any) -> Table:
    """A table in which what does not fit goes on in the next line: numbers cut short would be other numbers."""
    table = Table(**options)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_wide(console: Console, table: Table) -> None:
    """On a screen within its width; in a file or a pipe, which have none, as wide as the table is."""
    if not console.is_terminal:
        widest = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console = Console(file=console.file, width=widest)
    console.print(table)


def command_line() -> str:
    """The command as the user typed it."""
    import shlex

    return shlex.join(["qkit", *sys.argv[1:]])
