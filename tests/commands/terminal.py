"""Runs a command in a real terminal of a given width."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[2]


def in_terminal(folder: Path, columns: int, *arguments: str, **changes: str) -> tuple[int, str]:
    """Runs `dlopt ARGUMENTS`; returns the exit code and the raw terminal output, with control codes."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "dlopt", *arguments],
        cwd=folder,
        env=kept | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | changes,
        stdin=side,
        stdout=side,
        stderr=side,
    )
    os.close(side)
    blocks = []
    try:
        while block := os.read(main, 4096):
            blocks.append(block)
    except OSError:  # closed at the other end
        pass
    os.close(main)
    return process.wait(), b"".join(blocks).decode().replace("\r\n", "\n")


def plain(text: str) -> str:
    """Removes the control codes for colours and the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
