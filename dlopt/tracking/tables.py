"""Tables for terminals of any width: nothing is cut, and no word is broken."""

import os
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

_FOLDED = 16  # columns that a folding column keeps
_PIPED = 200  # columns of an output that is no terminal


def standard_output() -> Console:
    """As wide as the terminal."""
    return Console(highlight=False, markup=False, width=None if os.isatty(1) else _PIPED)


def plain_table(title: str | None = None) -> Table:
    """An empty table in the project's one look. A column that may be broken anywhere has overflow="fold"."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        header_style="bold",
        title=title,
        title_justify="left",
        title_style="",
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line of plain text for each row, its cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class Fitted:
    """`table` as wide as there is room for; where its words do not fit, its rows one below the other."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wanted, least = [], []
        for column in self.table.columns:
            head = str(column.header)
            content = max((cell_len(line) for cell in column.cells for line in str(cell).split("\n")), default=0)
            wanted.append(max([content, *map(cell_len, head.split("\n"))]))
            words = max([content, *map(cell_len, head.split())])
            least.append(min(words, _FOLDED) if column.overflow == "fold" else words)
        room = options.max_width - self._set_widths(console, least)
        if room < 0:
            yield _records(self.table)
            return
        for i, most in enumerate(wanted):
            more = min(most - least[i], room)
            least[i] += more
            room -= more
        self._set_widths(console, least)
        yield self.table

    def _set_widths(self, console: Console, widths: list[int]) -> int:
        """Returns the width of the whole table."""
        for column, width in zip(self.table.columns, widths, strict=True):
            column.width = width
        return console.measure(self.table, options=console.options.update(width=10_000)).maximum


def _records(table: Table) -> Group:
    """Each row as its first cell, and below it the others with their columns' names."""
    heads = [" ".join(str(column.header).split()) for column in table.columns]
    parts: list[RenderableType] = [] if table.title is None else [table.title]
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True):
        first, *others = map(_text, cells)
        parts.append(Text.assemble(first, style=row.style or "bold"))
        pairs = [Text.assemble((name, "dim"), " ", cell) for name, cell in zip(heads[1:], others, strict=True) if cell]
        parts += [_Flow(pairs)] if pairs else []
    parts += [] if table.caption is None else [table.caption]
    return Group(*parts)


class _Flow:
    """Texts beside each other as far as the width goes, a little indented."""

    def __init__(self, parts: list[Text]) -> None:
        self.parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text("  ")
        for part in self.parts:
            gap = "   " if line.plain.strip() else ""
            if gap and line.cell_len + len(gap) + part.cell_len > options.max_width:
                yield line
                line, gap = Text("  "), ""
            line = Text.assemble(line, gap, part, overflow="fold")
        yield line


def _text(cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))
