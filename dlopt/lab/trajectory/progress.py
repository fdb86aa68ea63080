"""What the plots of `dlopt trajectory` share: the key of their folder, and the progress in a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

Output = Annotated[str | None, "DIR: folder of the plots, PNG and SVG (default: outputs/trajectory/DATE_TIME)"]


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields a function that replaces the current line of a terminal; clears the line on exit."""

    def show(message: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{message}\033[K", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")
