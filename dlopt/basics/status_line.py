"""A line of a terminal that says what a command is doing, and that is removed when it is done."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Yields a function that replaces the current line of a terminal; clears the line on exit."""

    def show(message: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{message}\033[K", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Shows a line on a terminal while the block runs."""
    with status_line() as show:
        show(text)
        yield


def announce_dry_run() -> None:
    """Prints the first line of a dry run, before PyTorch is imported."""
    print("dry run: nothing is trained", flush=True)
