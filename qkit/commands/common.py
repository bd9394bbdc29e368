"""What several verbs share: the options of a request, progress, signals, tables.

The files of this folder import no torch at the top: what is wrong with a command is said before that takes its seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.bars import Bar, Share
from qkit.commands.grid import print_wide as print_wide
from qkit.commands.grid import wide_table as wide_table
from qkit.commands.verb import OutPath
from qkit.errors import Stopped, UsageError
from qkit.files.safefile import write_atomic
from qkit.files.side_files import code_keys, unread_files
from qkit.system.words import megabytes as megabytes
from qkit.transforms.table import EFFORTS, TRANSFORMS
from qkit.verification.record import printable

if TYPE_CHECKING:
    from qkit.workflows.quantize import PreparedRequest

_SIGNALS = (
    (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGINT, signal.SIGTERM)
)


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that describe what to quantize and how."""
    options = [
        click.option("--model", required=True, help="Model folder, reference model name, or hub id."),
        click.option("--revision", help="Branch, tag or commit of a model on the hub; the record has its commit."),
        click.option("--require-revision", is_flag=True, help="Refuse a model on the hub without --revision."),
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


class OutFile(OutPath):
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


def announce(console: Console, what: str) -> None:
    """The first line of a command: its options are sound, and what takes seconds begins."""
    context = click.get_current_context(silent=True)
    console.print(Text(f"qkit {context.info_name}: {what}" if context else what), soft_wrap=True)


class OutFolder(click.Path):
    """A folder that will be made: '.' is the folder that it means, and what can have no neighbours is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Raises UsageError for a name that no folder can have, or that other programs could not write."""
        name = param.opts[0] if param is not None else "folder"
        text = os.fsdecode(super().convert(value, param, ctx)) if value != "" else ""
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


def show_coverage(found: PreparedRequest, console: Console) -> None:
    """What is quantized, what is not and why, the bytes, and which engines will load the result."""
    from qkit.planning.fused_layers import engine_lines_of
    from qkit.workflows.quantize import coverage

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
    _show_copied(found, console)
    done = coverage(plan)
    console.print(
        f"{done['quantized']} linears quantized, {done['skipped']} skipped; tensors: {megabytes(plan.source_bytes)} before, "
        f"{megabytes(plan.packed_bytes)} after ({plan.packed_bytes / plan.source_bytes:.3f}x)"
    )
    for line in engine_lines_of(plan, found.structure):
        console.print(Text(str(line)))


def _show_copied(found: PreparedRequest, console: Console) -> None:
    """What does not go with the model: files, and keys of its settings."""
    folder = found.structure.checkpoint.path
    behind = unread_files(folder)
    if behind:
        more = f" and {len(behind) - 1} more" if len(behind) > 1 else ""
        console.print(
            Text(f"not copied: {printable(behind[0])}{more}: code, pickles, archives and weights in other formats")
        )
    dropped = {"config.json": list(found.structure.checkpoint.dropped), **code_keys(folder, found.plan.side_files)}
    for name, keys in dropped.items():
        if keys:
            console.print(
                Text(f"left out of {printable(name)}: {printable(', '.join(keys))}: keys that choose code to run")
            )


class Reporter:
    """How far a run is, on the console; also where a signal stops the run."""

    def __init__(self, console: Console, resume: str) -> None:
        self._resume = resume
        self._stop: int | None = None
        self._bar, self._share = Bar(console), Share()
        self._what = ""

    def expect(self, stages: Sequence[tuple[str, Sequence[float]]], finished: int = 0) -> None:
        """What the run will go through, as ``Share`` takes it: from here on the bar is that of the whole run."""
        self._share = Share(stages, finished)

    def start(self, what: str, total: int) -> None:
        """A new phase."""
        self._check()
        self._what = what
        self._bar.show(self._share.start(what, total), what)

    def step(self, amount: int = 1) -> None:
        """Some of the phase is done; a signal that came in takes effect here."""
        self._check()
        self._bar.show(self._share.step(amount), self._what)

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
            yield
        finally:
            self._bar.stop()
            for s, handler in before.items():
                signal.signal(s, handler)


def command_line() -> str:
    """The command as the user typed it."""
    import shlex

    return shlex.join(["qkit", *sys.argv[1:]])
