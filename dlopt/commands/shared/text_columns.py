"""Two columns of text, wrapped to the width of the terminal."""

import shutil
from collections.abc import Iterable

from dlopt.basics.formats import wrap


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
