"""Tables for people: within the width of a screen, with one line per row in a file, and never truncated."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | Text
_FEW = 12  # rows that are worth a line for each cell


@dataclass
class Grid:
    """Rows under named columns; cells given as str are markup of rich, as Text they are shown as they are."""

    columns: tuple[str, ...]
    title: str | None = None
    prose: bool = False
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

    def stacked(self) -> Table:
        """Row below row, a line for each column."""
        table = self._empty(self.columns[0], "")
        for cells in self.rows:
            table.add_row(cells[0], "", style="bold")
            for column, cell in zip(self.columns[1:], cells[1:], strict=True):
                if _plain(cell):
                    table.add_row(Text(f"  {column}"), cell)
        return table

    def plain(self) -> list[list[str]]:
        """The rows without markup, for a page."""
        return [[_plain(cell) for cell in cells] for cells in self.rows]

    def _empty(self, *columns: str) -> Table:
        title = None if self.title is None else Text(self.title, justify="left")
        table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False)
        for column in columns:
            table.add_column(Text(column), overflow="fold")
        return table


def _plain(cell: Cell) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(cell).plain


def wide_table(*columns: str, title: str | None = None, prose: bool = False) -> Grid:
    """A table in which what does not fit goes on in the next line: numbers cut short would be other numbers. prose: cells hold
    sentences, which are made to go on there."""
    return Grid(columns, title, prose)


def print_wide(console: Console, grid: Grid) -> None:
    """On a screen within its width: where the table does not fit turned or row below row, and long tables with cells that go
    on in the next line. In a file or a pipe, which have no width, as wide as the table is."""
    table = grid.table()
    widest = _width(console, table)
    if not console.is_terminal:
        console = Console(file=console.file, width=widest)
    elif widest > console.width and not grid.prose and len(grid.rows) <= _FEW:
        fitting = (form for form in (grid.turned(), grid.stacked()) if _width(console, form) <= console.width)
        table = next(fitting, table)
    console.print(table)


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def interval(ends: list[float], form: str) -> str:
    """'[low, high]'; nothing where one window gives no spread."""
    if any(end != end for end in ends):
        return ""
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def printable(name: str) -> str:
    """A name without control characters, which could change the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
