"""Tables of results that stay readable where a terminal is narrow: no number and no name is cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Justify = Literal["left", "right"]

NOTE_WIDTH = 24
"""Least columns that a note is wrapped to beside the cells."""
NAME_WIDTH = 12
"""Least columns that a name is broken to."""
NAMED = 3
"""Rows that are named where several share a note."""


class Sheet:
    """Rows of short cells, each with a note in words.

    Notes stand in a last column where the terminal has room for it, else under the table, each text once with the rows
    it is about. Cells that do not fit even so are broken over lines. Everything is plain text: brackets are no markup.
    """

    def __init__(self, title: str, columns: Mapping[str, Justify], note: str) -> None:
        self.title, self.columns, self.note = title, dict(columns), note
        self.rows: list[tuple[tuple[str, ...], str, str | None]] = []

    def add(self, *cells: str, note: str = "", style: str | None = None) -> None:
        """Add a row: a cell for each column, what is said of it, and a style of rich."""
        self.rows.append((cells, note, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = self._table(box.HEAVY_HEAD, 1, NOTE_WIDTH)
        if _width(wide, console, options) <= options.max_width:
            yield self._table(box.HEAVY_HEAD, 1, None)
            return
        narrow = self._table(box.SIMPLE_HEAD, 0, 0)
        if _width(narrow, console, options) > options.max_width:
            for column in narrow.columns:
                column.no_wrap, column.overflow = False, "fold"
        yield narrow
        told = [(cells[0], note) for cells, note, _ in self.rows if note]
        if told:
            yield Text(grouped(told))

    def _table(self, lines: box.Box, padding: int, note: int | None) -> Table:
        """The table with notes in a column of ``note`` columns at most, of any number for None, or without for 0."""
        table = Table(title=Text(self.title, "table.title"), box=lines, padding=(0, padding))
        for name, justify in self.columns.items():
            table.add_column(Text(name), justify=justify, no_wrap=True)
        if note != 0:
            table.add_column(Text(self.note), max_width=note, overflow="fold")
        for cells, text, style in self.rows:
            table.add_row(*map(Text, (*cells, text) if note != 0 else cells), style=style)
        return table


class Uncut:
    """A table of rich whose first column, of names, is broken over lines where the terminal is narrow, then all are."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names, *numbers = self.table.columns
        for column in numbers:
            column.no_wrap = True
        if _width(self.table, console, options) > options.max_width:
            names.no_wrap, names.overflow = False, "fold"
            names.width = NAME_WIDTH
            if _width(self.table, console, options) > options.max_width:
                for column in numbers:
                    column.no_wrap, column.overflow = False, "fold"
            names.width, names.min_width = None, NAME_WIDTH
        yield self.table


def grouped(told: Iterable[tuple[str, str]]) -> str:
    """Lines that say each text of (place, text) once: behind its place, or before the first of several."""
    places: dict[str, list[str]] = {}
    for place, text in told:
        found = places.setdefault(text, [])
        if place not in found:
            found.append(place)
    return "\n".join(_line(text, found) for text, found in places.items())


def _line(text: str, places: Sequence[str]) -> str:
    return f"{places[0]}: {text}" if len(places) == 1 else f"{text}: {named(places)}"


def named(places: Sequence[str]) -> str:
    """The first names and the number of the others."""
    first = ", ".join(places[:NAMED])
    return first if len(places) <= NAMED else f"{first} and {len(places) - NAMED} more"


def _width(table: Table, console: Console, options: ConsoleOptions) -> int:
    """Columns of the table with no line broken."""
    return Measurement.get(console, options.update(max_width=10_000), table).maximum
