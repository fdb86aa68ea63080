"""A table of texts for terminals, LaTeX and Markdown; templates render it as HTML by `table` in macros.html."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from dlopt.basics.formats import printable
from dlopt.results.reading import number_in
from dlopt.tracking.terminal_text import FittedTable, plain_table

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
}  # fmt: skip

_MATHEMATICS = re.compile(r"[±\[+]|-\d|\de\d")


class Bold(str):
    """A cell that stands out."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """Heads and rows of texts: the first `texts` columns are aligned to the left, the others, numbers, to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    title: str | None = None

    def grid(self) -> FittedTable:
        """Returns the table for a terminal, where the texts may be wrapped inside words."""
        grid = plain_table(self.title, fold=self.heads[: self.texts], right=self.heads[self.texts :])
        for row in self.rows:
            grid.add_row(*(Text(printable(cell), "bold" if isinstance(cell, Bold) else "") for cell in row))
        return FittedTable(grid)

    def latex(self) -> list[str]:
        """Returns the lines of a `tabular` with the rules of booktabs."""
        columns = "l" * self.texts + "r" * (len(self.heads) - self.texts)
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(escaped, self.heads)) + r" \\"]
        rows = [[*map(escaped, row[: self.texts]), *map(_number, row[self.texts :])] for row in self.rows]
        body = [" & ".join(row) + r" \\" for row in rows]
        return [*lines, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]

    def markdown(self) -> list[str]:
        """Returns the lines of a Markdown table."""
        rule = [*["---"] * self.texts, *["---:"] * (len(self.heads) - self.texts)]
        lines = [list(map(_markdown, self.heads)), rule, *(list(map(_markdown, row)) for row in self.rows)]
        return [f"| {' | '.join(cells)} |" for cells in lines]


@dataclass(frozen=True)
class RunSection:
    """What a package adds to the view of one run on the page.

    `arguments`: of a dlopt command to copy, which also gets the run's overrides of `keys`; `table`: its result, if any.
    """

    lines: Sequence[str]
    arguments: Sequence[str] = ()
    keys: Sequence[str] = ()
    table: Table | None = None
    is_urgent: bool = False  # whether the run needs it: the command is also shown in lists of runs


@dataclass(frozen=True)
class Section:
    """What a package adds to `dlopt report`: a table on the page, lines in the terminal, parts of the views of runs."""

    title: str
    table: Table | None = None
    lines: Sequence[str] = ()
    runs: Mapping[Path, RunSection] = field(default_factory=dict)


def spreadsheet_cell(value: Any) -> Any:
    """Quotes text that a spreadsheet would evaluate as a formula."""
    if not isinstance(value, str):
        return "" if value is None else value
    value = printable(value)
    is_formula = value[:1] in ("=", "+", "-", "@") and number_in(value) is None
    return f"'{value}" if is_formula else value


def _markdown(cell: str) -> str:
    """Escapes what would end the cell, or be a tag or a link."""
    for special, escaped in (("\\", r"\\"), ("|", r"\|"), ("<", "&lt;"), ("](", r"]\(")):
        cell = cell.replace(special, escaped)
    return printable(cell)


def escaped(text: str) -> str:
    """Escapes LaTeX's special characters; a bracket after a line's end would be read as its optional argument."""
    return "{}" * text.startswith("[") + "".join(_SPECIAL.get(character, character) for character in printable(text))


def _number(cell: str) -> str:
    """Converts 0.83 ± 0.02 or 0.83 [0.71, 0.90] to LaTeX's math mode; values without a sign stay text."""
    if cell == "-":
        return "--"
    if _MATHEMATICS.search(cell) is None:
        text = escaped(cell).replace(r" \%", r"\,\%")
        return rf"\textbf{{{text}}}" if isinstance(cell, Bold) else text
    inner = printable(cell).replace("±", r"\pm").replace(" [", r"\ [").replace(", ", r",\ ")
    return rf"$\mathbf{{{inner}}}$" if isinstance(cell, Bold) else f"${inner}$"
