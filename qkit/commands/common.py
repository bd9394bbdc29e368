"""Shared parts of several verbs: the options of a request, progress, signals, tables.

The files of this folder import no torch at the top, so that a wrong command is refused at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.bars import Bar, Share
from qkit.commands.experts import expert_options
from qkit.commands.grid import print_wide as print_wide
from qkit.commands.grid import wide_table as wide_table
from qkit.commands.verb import OptionGroup, OutPath, RenamedOption, in_group
from qkit.errors import Stopped, UsageError
from qkit.files.safefile import write_atomic
from qkit.planning.quality_levels import LEVELS
from qkit.system.words import megabytes as megabytes
from qkit.transforms.table import EFFORTS

if TYPE_CHECKING:
    pass

_Command = TypeVar("_Command", bound=Callable[..., Any])
_SIGNALS = (
    (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGINT, signal.SIGTERM)
)


CALIB_HELP = (
    "Calibration data, repeatable with weights (chat.jsonl:2): a text, chats or texts in JSON lines, JSON, CSV or Parquet, "
    "dataset:NAME[:config][:split][:column], image-text data"
)


def row_options(option: Callable[..., Any]) -> Callable[[_Command], _Command]:
    """The options that say how calibration samples are made from data. option: ``in_group`` of their group."""
    options = [
        option("--samples", type=int, help="Number of calibration samples (default: 128)."),
        option("--seqlen", type=int, help="Tokens per calibration sample (default: 256)."),
        option(
            "--padded",
            is_flag=True,
            help="One record (chat or text) per sample, cut to --seqlen or padded. Padding is in no statistic. (Default: "
            "records are packed one behind the other.)",
        ),
        option("--answers-only", is_flag=True, help="Only the tokens of answers in chats count in statistics."),
    ]

    def add(command: _Command) -> _Command:
        for decorate in reversed(options):
            command = decorate(command)
        return command

    return add


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that describe what to quantize and how."""
    most_used, scheme, calibration = (
        in_group(OptionGroup.MOST_USED),
        in_group(OptionGroup.SCHEME),
        in_group(OptionGroup.CALIBRATION),
    )
    model, diffusion, job = in_group(OptionGroup.MODEL), in_group(OptionGroup.DIFFUSION), in_group(OptionGroup.JOB)
    options = [
        most_used("--model", required=True, help="Model folder, reference model name, or hub id."),
        most_used(
            "--scheme",
            help="Number formats of weights and activations, for instance w4a16, w8a8 or nvfp4 ('qkit list schemes').",
        ),
        most_used(
            "--method",
            help="Quantization method, in place of --quality: rtn, gptq, awq, mbq, smoothquant, rotate, hadamard, residual, "
            "signround, auto, requant, or a sum such as awq+gptq ('qkit list methods').",
        ),
        most_used(
            "--quality",
            type=click.Choice(LEVELS),
            help="Chooses the method: fast (rounding, no data), balanced (calibrated, the default), best (learned rounding "
            "where it pays). 'qkit plan' says what is chosen, and what the next level costs.",
        ),
        most_used("--group-size", type=int, help="Weights per scale; -1 for one scale per output channel."),
        most_used(
            "--calib",
            multiple=True,
            metavar="DATA[:COLUMN][:WEIGHT]",
            help=CALIB_HELP + ", or prompts of a diffusion pipeline (default: embedded data).",
        ),
        model("--base", help="The model that an adapter (LoRA), given as --model, is merged into."),
        model("--revision", help="Branch, tag or commit of a hub model. The commit is recorded in qkit.json."),
        model("--require-revision", is_flag=True, help="Refuse a hub model without --revision."),
        model(
            "--export",
            type=click.Choice(["compressed-tensors", "qkit", "gptq", "awq", "modelopt", "mlx"]),
            help="Layout of the result (default: the first). Files in that of qkit load after 'import qkit'.",
        ),
        scheme(
            "--recipe",
            type=click.Path(path_type=Path),
            help="YAML file with rules per layer, or recipe.yaml of a result, which makes the same weights again. Other "
            "options replace what it says.",
        ),
        scheme(
            "--keep-source",
            "keep_source",
            multiple=True,
            metavar="GLOB",
            help="Layers that stay as a source that is quantized already stores them, repeatable: '*.experts.*'.",
        ),
        scheme(
            "--option",
            "options",
            multiple=True,
            metavar="NAME=VALUE",
            help="Option of the method, repeatable ('qkit list methods').",
        ),
        scheme(
            "--effort",
            type=click.Choice(list(EFFORTS)),
            help="Effort of learned rounding (signround): "
            + ", ".join(f"{name} ({o['steps']} steps)" for name, o in EFFORTS.items())
            + ". 'qkit plan' shows its share of the time.",
        ),
        scheme(
            "--outliers",
            type=float,
            help="Percent of weights, the largest ones, kept in 16 bits beside the quantized weights.",
        ),
        scheme(
            "--rank",
            type=int,
            help="Rank of a low-rank branch in 16 bits that corrects the rounding error (0: no branch).",
        ),
        scheme(
            "--significant",
            type=float,
            help="Percent of weights restored to 16 bits after quantization, chosen by loss sensitivity.",
        ),
        scheme(
            "--embeddings",
            metavar="FORMAT",
            help="Format of the embeddings: int2 to int8, int4:32 with the group size, or auto where a budget decides "
            "(default: they stay as they are).",
        ),
        scheme(
            "--head",
            metavar="FORMAT",
            help="Format of the output head, as for --embeddings. Tied embeddings and head are one matrix, stored once.",
        ),
        scheme(
            "--unloaded",
            metavar="FORMAT",
            help="Format of matrices in the file that the model's class does not load, such as heads for multi-token "
            "prediction (mtp.*): int2 to int8, int4:32 with the group size (default: they stay as they are).",
        ),
        scheme(
            "--target",
            "targets",
            multiple=True,
            metavar="PART=SCHEME",
            help="Scheme of another part of the model, repeatable: vision=w8a8, projector=skip, text_encoder=w8a16 "
            "(default: auto, chosen by measurement).",
        ),
        expert_options(scheme, calibration),
        scheme("--strict", is_flag=True, help="Refuse a group size that does not divide a layer's width."),
        row_options(calibration),
        calibration(
            "--synthetic-samples",
            type=int,
            help="Number of calibration samples that the model generates itself, in addition to --samples (default: those of "
            "--quality, which qkit plan lists; with --method: 0). With --samples 0 no data is needed.",
        ),
        click.option("--written", cls=RenamedOption, now="--synthetic-samples", type=int),
        diffusion(
            "--call",
            "call",
            multiple=True,
            metavar="NAME=VALUE",
            help="Argument of the pipeline call during calibration, repeatable: num_inference_steps=20, height=480.",
        ),
        diffusion("--rows-memory", metavar="SIZE", help="Memory limit of the calibration samples, for instance 500MB."),
        diffusion(
            "--policy",
            "policy",
            multiple=True,
            metavar="NAME=VALUE",
            help="Setting of --scheme 6bit, repeatable: width=5 (mean bits of activations), skips=0.25 (share of block "
            "runs to skip), kind=dmpq, static or decoupled, cache=delta or schedule, weigh=true (errors weighted by their "
            "effect on the final sample).",
        ),
        job(
            "--seed",
            type=int,
            help="Random seed of rotations, synthetic samples and the order of learning (default: 0).",
        ),
        job(
            "--threads",
            type=int,
            help="Number of worker threads (default: all cores). The result does not depend on it.",
        ),
        job(
            "--device",
            metavar="DEVICE",
            default="auto",
            help="Device that computes: cpu, cuda, or cuda:1 for the second GPU (default: auto, the first GPU, or the CPU "
            "where PyTorch sees none).",
        ),
        job("--json", "json_file", type=OutFile(), help="JSON file for the printed results."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


class OutFile(OutPath):
    """A file that will be written, checked before anything is computed."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Raises UsageError where it cannot be written."""
        file = Path(str(super().convert(value, param, ctx)))
        name = param.opts[0] if param is not None else "file"
        if file.is_dir():
            raise UsageError(f"{name} {file}: that is a folder: use a file name")
        if file.exists() and not file.is_file():  # a file that takes its name would be in the place of a device
            raise UsageError(f"{name} {file}: that is a device or a pipe, and no file: use a file name")
        if not file.absolute().parent.is_dir():
            raise UsageError(f"{name} {file}: there is no folder {file.parent}: create it first")
        return file


def announce(console: Console, what: str) -> None:
    """The first line of a command: its options are valid, and the slow part begins."""
    context = click.get_current_context(silent=True)
    console.print(Text(f"qkit {context.info_name}: {what}" if context else what), soft_wrap=True)


class OutFolder(click.Path):
    """A folder that will be created: '.' is resolved, and a folder that cannot have neighbors is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Raises UsageError for a name that no folder can have, or that other programs could not write."""
        name = param.opts[0] if param is not None else "folder"
        text = os.fsdecode(super().convert(value, param, ctx)) if value != "" else ""
        if not text or "\0" in text:
            raise UsageError(f"{name} {text!a}: that is no name of a folder: use another")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{name} {text!a}: the name is not UTF-8: use another") from None
        folder = Path(text)
        folder = folder if folder.name not in ("", "..") else Path(os.path.abspath(text))
        if not folder.name:
            raise UsageError(f"{name} {text}: that is the root of the file system: use a folder in it")
        return folder


def write_json(file: Path | None, data: Any) -> None:
    """Writes the printed results of a command as JSON."""
    if file is not None:
        write_atomic(file, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


class Reporter:
    """Progress of a run on the console; also the place where a signal stops the run."""

    def __init__(self, console: Console, resume: str) -> None:
        self._resume = resume
        self._stop: int | None = None
        self._bar, self._share = Bar(console), Share()
        self._what = ""

    def expect(
        self,
        stages: Sequence[tuple[str, Sequence[float]]],
        finished: int = 0,
        ahead: Mapping[str, float] = {},
        behind: Mapping[str, float] = {},
    ) -> None:
        """The blocks of the run and what is around them, as for ``Share``: from here on the bar shows the complete run."""
        self._share = Share(stages, finished, ahead, behind)

    def start(self, what: str, total: int) -> None:
        """A new phase."""
        self._check()
        self._what = what
        self._bar.show(self._share.start(what, total), what)

    def step(self, amount: int = 1) -> None:
        """A part of the phase is done; a signal that arrived stops the run here."""
        self._check()
        self._bar.show(self._share.step(amount), self._what)

    def _check(self) -> None:
        if self._stop is not None:
            name = signal.Signals(self._stop).name
            raise Stopped(f"stopped by {name}; finished work is kept. Continue with: {self._resume}")

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
