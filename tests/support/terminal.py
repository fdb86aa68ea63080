"""Runs a command in a real terminal of a given width."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

from tests.support.processes import start


def in_terminal(folder: Path, columns: int, *arguments: str, **changes: str) -> tuple[int, str]:
    """Runs `dlopt ARGUMENTS`; returns the exit code and the raw terminal output, with control codes."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    environment = kept | {"TERM": "xterm-256color"} | changes
    process = start(_dlopt, (arguments,), environment, folder, dict.fromkeys((0, 1, 2), os.ttyname(side)))
    os.set_blocking(main, False)
    blocks = []
    while process.is_alive():
        process.join(0.02)
        blocks += _read(main)
    os.close(side)
    blocks += _read(main)
    os.close(main)
    assert process.exitcode is not None
    return process.exitcode, b"".join(blocks).decode().replace("\r\n", "\n")


def _read(terminal: int) -> list[bytes]:
    blocks = []
    try:
        while block := os.read(terminal, 1 << 16):
            blocks.append(block)
    except OSError:  # nothing to read, or closed at the other end
        pass
    return blocks


def _dlopt(arguments: tuple[str, ...]) -> None:
    """Runs in the new process. Reopens its streams, because Python opened them before they were the terminal."""
    from dlopt import cli

    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, 1) for i, mode in enumerate("rww"))
    sys.argv = ["dlopt", *arguments]
    cli.main()


def plain(text: str) -> str:
    """Removes the control codes for colours and the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
