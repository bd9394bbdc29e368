"""The figures of ``qkit eval`` in the card of a result: the tables of the terminal, in a section of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qkit.commands.grid import Grid, printable
from qkit.commands.measured import grids
from qkit.files.card import FIGURES, rewrite_card, with_section
from qkit.files.record import packed_record
from qkit.system.version import __version__


def write_figures(folders: Sequence[Path], measured: Iterable[Mapping[str, Any]]) -> None:
    """Put the figures of each folder into its card, in place of those that were there. Raises as ``rewrite_card``."""
    for folder, figures in zip(folders, measured, strict=True):
        text = "\n".join(_section(folder, figures)).encode()
        rewrite_card(folder, partial(with_section, name=FIGURES, text=text))


def _section(folder: Path, measured: Mapping[str, Any]) -> Iterator[str]:
    baseline = measured.get("baseline")
    against = ""
    if baseline is not None:
        against = f", compared with {_cell(packed_record(folder)['source'].get('repository') or baseline)}"
    yield "## Figures"
    yield ""
    yield f"Measured by `qkit eval` {__version__}{against}. Intervals are of 95 %."
    for grid in grids([measured]):
        yield ""
        yield from _table(grid)


def _table(grid: Grid) -> Iterator[str]:
    if grid.title:
        yield f"{_cell(grid.title)}:"
        yield ""
    yield f"| {' | '.join(map(_cell, grid.columns))} |"
    yield "|" + " --- |" * len(grid.columns)
    for cells in grid.plain():
        yield f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text in one cell of a table of Markdown."""
    return " ".join(printable(text).split()).replace("|", "\\|").replace("<", "&lt;")
