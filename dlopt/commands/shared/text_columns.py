"""Two columns of text, wrapped to the width of the terminal."""

import re
import shutil
import textwrap
from collections.abc import Iterable
from itertools import groupby

from dlopt.basics.formats import wrap

_PROSE = re.compile(r"( *)(?!dlopt |srun -|Usage: | )((?!  ).)+")
_GAP = re.compile(r"( *.*\S)(?: {2,}| (?=# ))(\S.*)")  # between two columns, or a command and its comment
_NARROW = 20  # first column beside which the second one is wrapped


def two_columns(rows: Iterable[tuple[str, str]], *, indent: int = 2, limit: int = 34, width: int = 0) -> list[str]:
    """Formats rows; wraps the right column to `width` (default: the terminal's); a long left one has its own line."""
    rows = list(rows)
    width = width or max(shutil.get_terminal_size().columns, 60)
    column = min(max(len(left) for left, _ in rows), limit) + 2
    return [line for left, right in rows for line in wrap_row(" " * indent + left, right, indent + column - 2, width)]


def wrap_row(left: str, right: str, column: int, width: int | None) -> list[str]:
    """Formats two columns in lines of `width` characters (None for no limit); a long left one has a line of its own."""
    indent = " " * (column + 2)
    if width is None:
        return [f"{left:{column}}  {right}".rstrip()]
    if not right:
        return [left]
    if len(left) > column:
        return [left, *wrap(right, width, first=indent, indent=indent)]
    return wrap(right, width, first=f"{left:{column}}  ", indent=indent)


def fitted(text: str, width: int) -> str:
    """Wraps a help to `width` characters: paragraphs again, and each longer line alone."""
    lines: list[str] = []
    for indent, group in groupby(text.splitlines(), lambda line: (match := _PROSE.fullmatch(line)) and match[1]):
        together = [*group]
        if max(map(len, together)) <= width:
            lines += together
        elif indent is not None:
            lines += wrap(" ".join(map(str.strip, together)), width, first=indent, indent=indent)
        else:
            lines += [each for line in together for each in _broken(line, width)]
    return "\n".join(lines)


def _broken(line: str, width: int) -> list[str]:
    """Breaks a line at its last gap; one without a gap between its words, a command so that it can still be pasted."""
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    if found := _GAP.fullmatch(line):
        if (column := found.start(2)) <= _NARROW:
            return wrap(found[2], width, first=line[:column], indent=" " * column)
        return [*_broken(found[1], width), *wrap(found[2], width, first=indent, indent=indent)]
    broken = textwrap.wrap(line, width - 2, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return ("\n" if " [" in line else " \\\n").join(broken).split("\n")  # of a synopsis, no line is typed
