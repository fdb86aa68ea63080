"""`--json`: prints one JSON document on stdout, for scripts and agents, in place of tables.

Keys and values are documented in docs/howto/json.md.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dlopt.basics.interruption import leave_closed_terminal
from dlopt.basics.plain_values import without_nan
from dlopt.basics.secrets import redacted

FORMAT = 1
"""Version of the documents: it changes if a key changes its meaning or disappears. New keys may be added."""
Show = Callable[[Mapping[str, Any]], None]


def print_document(content: Mapping[str, Any]) -> None:
    """Prints a document of plain values, in full precision: null for NaN and infinity, references for secrets."""
    document = without_nan(redacted({"format": FORMAT, **content}))
    print(json.dumps(document, indent=2, allow_nan=False), flush=True)


@contextlib.contextmanager
def document_only() -> Iterator[Show]:
    """Redirects stdout of the block, and of every process that it starts, to stderr.

    Yields the function that ends this and prints a document on stdout.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(_descriptor_to_stderr())

        def show(content: Mapping[str, Any]) -> None:
            stack.close()
            try:
                print_document(content)
            except BrokenPipeError:  # the reader is gone: the exit code is still the command's
                leave_closed_terminal()

        yield show


@contextlib.contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    """Redirects the file descriptor, which child processes and libraries in C write to."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
