"""Tables for people: on one line each in a file, within the width of a screen, and never cut short."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | Text


@dataclass
class Grid:
    """Rows under named columns; cells given as str are markup of rich, as Text they are shown as they are."""

    columns: tuple[str, ...]
    title: str | None = None
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)

    def add_row(self, *cells: Cell, style: str = "") -> None:
        """One cell for each column."""
        self.rows.append(cells)
        self.styles.append(style)

    def __rich__(self) -> Table:
        return self.table()

    def table(self) -> Table:
        """As the columns stand."""
        table = self._empty(*self.columns)
        for cells, style in zip(self.rows, self.styles, strict=True):
            table.add_row(*cells, style=style)
        return table

    def turned(self) -> Table:
        """Columns as rows: what has more columns than a screen is wide usually has few rows."""
        table = self._empty(self.columns[0], *(_plain(cells[0]) for cells in self.rows))
        for i, column in enumerate(self.columns[1:], 1):
            table.add_row(column, *(cells[i] for cells in self.rows))
        return table

    def plain(self) -> list[list[str]]:
        """The rows without markup, for a page."""
        return [[_plain(cell) for cell in cells] for cells in self.rows]

    def _empty(self, *columns: str) -> Table:
        title = None if self.title is None else Text(self.title)
        table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for column in columns:
            table.add_column(Text(column), overflow="fold")
        return table


def _plain(cell: Cell) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(cell).plain


def wide_table(*columns: str, title: str | None = None) -> Grid:
    """A table in which what does not fit goes on in the next line: numbers cut short would be other numbers."""
    return Grid(columns, title)


def print_wide(console: Console, grid: Grid) -> None:
    """On a screen within its width, turned where that fits and the table does not; in a file or a pipe, which have no width, as
    wide as the table is."""
    table, widest = grid.table(), _width(console, grid.table())
    if not console.is_terminal:
        console = Console(file=console.file, width=widest)
    elif widest > console.width and _width(console, grid.turned()) <= console.width:
        table = grid.turned()
    console.print(table)


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum
