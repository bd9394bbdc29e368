"""The class of every verb: grouped help, former names of options, and the protection of input files."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from qkit.errors import RenamedWarning, UsageError
from qkit.system.memory import require_room_for_libraries

# A folder with one of these is a model, a result, a job or a profile: a file more, or another one, would spoil it.
_MARKS = ("config.json", "model_index.json", "qkit.json", "job.json", "measured.jsonl", "profile.json")

_Command = TypeVar("_Command", bound=Callable[..., Any])


class OptionGroup(Enum):
    """The groups of the help, in their order. ``-h`` shows the options of the first one and names the others."""

    MOST_USED = "Most used"
    MODEL = "Model and output"
    SCHEME = "Scheme and method"
    CALIBRATION = "Calibration"
    BUDGETS = "Budgets"
    TEXTS = "Texts and tasks"
    IMAGE_TEXT = "Image-text data"
    KV_CACHE = "KV cache"
    MEASURES = "Measures"
    CURVE = "Pareto curve"
    PRODUCTS = "Products"
    DECODING = "Decoding"
    DIFFUSION = "Diffusion"
    ENGINE = "Engine"
    DEVICE = "Device"
    JOB = "Job"


class GroupedOption(click.Option):
    """An option that the help shows in a group."""

    def __init__(self, *args: Any, group: OptionGroup, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group


class RenamedOption(click.Option):
    """The former name of an option: it goes on working for one version, with a note. now: the option's name today."""

    def __init__(self, *args: Any, now: str, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "hidden": True})
        self.now = now


def in_group(group: OptionGroup) -> Callable[..., Callable[[_Command], _Command]]:
    """``click.option`` for the options of a group."""
    return partial(click.option, cls=GroupedOption, group=group)


class OutPath(click.Path):
    """The type of options that name a file to be written."""


class Verb(click.Command):
    """A command of qkit. Raises UsageError for an output file that would replace an input."""

    @property
    def _grouped(self) -> dict[OptionGroup, list[GroupedOption]]:
        groups: dict[OptionGroup, list[GroupedOption]] = {}
        for param in self.params:
            if isinstance(param, GroupedOption):
                groups.setdefault(param.group, []).append(param)
        return {group: groups[group] for group in OptionGroup if group in groups}

    # ---- help --------------------------------------------------------------------------------------------------

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """``-h`` is an option of its own where options have groups. Whoever makes the context, the names are these: click keeps
        the first option that it builds from them."""
        return ["--help"] if self._grouped else ["-h", "--help"]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The options, with those of the help."""
        params = super().get_params(ctx)
        if not self._grouped:
            return params
        brief = click.Option(
            ["-h"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=self._show_brief,
            help="Show this short help.",
        )
        return [*self.params, brief, *params[len(self.params) :]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """All options, each group under its title."""
        grouped = self._grouped
        if not grouped:
            super().format_options(ctx, formatter)
            return
        for group, options in grouped.items():
            _write_options(group.value, options, ctx, formatter)
        rest = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and not isinstance(p, GroupedOption)]
        _write_options("Help", rest, ctx, formatter)

    def _show_brief(self, ctx: click.Context, _: click.Parameter, asked: bool) -> None:
        if asked and not ctx.resilient_parsing:
            click.echo(self._brief_help(ctx), color=ctx.color)
            ctx.exit()

    def _brief_help(self, ctx: click.Context) -> str:
        """The first sentence, the example, the options of the first group, and the names of the other groups."""
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        first, *others = inspect.cleandoc(self.help or "").split("\n\n")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text("\n\n".join((first, *(text for text in others if "Example:" in text))))
        (group, options), *rest = self._grouped.items()
        _write_options(group.value, options, ctx, formatter)
        with formatter.section("More options, explained by --help"):
            formatter.write_dl([(g.value, ", ".join(max(o.opts, key=len) for o in found)) for g, found in rest])
        return formatter.getvalue().rstrip("\n")

    # ---- what is checked before a command runs -----------------------------------------------------------------

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Values that came under a former name of an option go to the option."""
        rest = super().parse_args(ctx, args)
        for param in self.params:
            if not isinstance(param, RenamedOption):
                continue
            value, old = ctx.params.pop(param.name or ""), param.opts[0]
            if value is None:
                continue
            name = param.now.removeprefix("--").replace("-", "_")
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise UsageError(f"{old} is the former name of {param.now}, and both are used: use {param.now} alone")
            warnings.warn(
                f"{old} is now {param.now}: the old name goes in the next version", RenamedWarning, stacklevel=2
            )
            ctx.params[name] = value
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, once its output files were looked at."""
        require_room_for_libraries()
        written: dict[Path, str] = {}
        for param in self.params:
            value = ctx.params.get(param.name or "")
            if not isinstance(param.type, OutPath) or value is None:
                continue
            option, real = param.opts[0], _real(value)
            if real in written:
                raise UsageError(
                    f"{option} {value}: {written[real]} names the same file: use a different file for each"
                )
            written[real] = option
            self._refuse_lost_input(ctx, option, Path(value))
        return super().invoke(ctx)

    def _refuse_lost_input(self, ctx: click.Context, option: str, file: Path) -> None:
        real = _real(file)
        for param in self.params:
            if isinstance(param.type, OutPath):
                continue
            name = param.opts[0] if isinstance(param, click.Option) else str(param.name).upper()
            for source in _paths(ctx.params.get(param.name or "")):
                other = _real(source)
                if real == other and source.exists():
                    raise UsageError(f"{option} {file}: that is the file of {name}: use another file")
                between = [p for p in real.parents if p == other or other in p.parents] if source.is_dir() else []
                result = self.name == "quantize" and param.name in ("out", "work")
                if between and (result or any((p / mark).is_file() for p in between for mark in _MARKS)):
                    raise UsageError(
                        f"{option} {file}: that lies in the folder of {name}, {source}: use a file elsewhere"
                    )


def _write_options(title: str, options: list[Any], ctx: click.Context, formatter: click.HelpFormatter) -> None:
    records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _paths(value: Any) -> Iterator[Path]:
    """Every path that a parameter may name: NAME=FILE and FILE:COLUMN:WEIGHT too."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, (str, Path)) and str(value):
        yield Path(value)
        rest = str(value).partition("=")[2]
        if rest:
            yield Path(rest)
        yield from (Path(str(value)[: colon.start()]) for colon in re.finditer(":", str(value)) if colon.start())
