"""What every verb looks at before it runs: no output option may name a file that the command reads, or another's output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from qkit.errors import UsageError

# A folder with one of these is a model, a result, a job or a profile: a file more, or another one, would spoil it.
_MARKS = ("config.json", "model_index.json", "qkit.json", "job.json", "measured.jsonl", "profile.json")


class OutPath(click.Path):
    """The type of options that name a file to be written."""


class Verb(click.Command):
    """A command of qkit. Raises UsageError for an output file that would take the place of an input."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, once its output files were looked at."""
        written: dict[Path, str] = {}
        for param in self.params:
            value = ctx.params.get(param.name or "")
            if not isinstance(param.type, OutPath) or value is None:
                continue
            option, real = param.opts[0], _real(value)
            if real in written:
                raise UsageError(f"{option} {value}: {written[real]} names the same file: give each a file of its own")
            written[real] = option
            self._refuse_lost_input(ctx, option, Path(value))
        return super().invoke(ctx)

    def _refuse_lost_input(self, ctx: click.Context, option: str, file: Path) -> None:
        real = _real(file)
        for param in self.params:
            if isinstance(param.type, OutPath):
                continue
            name = param.opts[0] if isinstance(param, click.Option) else str(param.name).upper()
            for given in _paths(ctx.params.get(param.name or "")):
                other = _real(given)
                if real == other and given.exists():
                    raise UsageError(f"{option} {file}: that is the file of {name}: name another file")
                between = [p for p in real.parents if p == other or other in p.parents] if given.is_dir() else []
                result = self.name == "quantize" and param.name in ("out", "work")
                if between and (result or any((p / mark).is_file() for p in between for mark in _MARKS)):
                    raise UsageError(
                        f"{option} {file}: that lies in the folder of {name}, {given}: name a file elsewhere"
                    )


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _paths(value: Any) -> Iterator[Path]:
    """Every path that a parameter may name: NAME=FILE too."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, (str, Path)) and str(value):
        yield Path(value)
        rest = str(value).partition("=")[2]
        if rest:
            yield Path(rest)
