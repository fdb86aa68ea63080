"""Keeps texts of strangers, such as names of classes, columns and files, from controlling the user's terminal."""

import os
import re
from collections.abc import Iterable
from typing import Any, TextIO

# Control characters (also ESC, and CSI as one character), marks that reverse the order of texts, and lone surrogates.
_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOURS_OR_CONTROLS = re.compile(rf"(\x1b\[[\d;]*m)|{_CONTROLS.pattern}")  # colours change no other text


def without_controls(text: str) -> str:
    """Replaces the characters that would control a terminal; keeps lines and tabs."""
    return _CONTROLS.sub("�", text)


class TerminalStream:
    """stdout at a terminal: replaces control characters, but not colours.

    `unfiltered` is for what moves the cursor, and has replaced them itself.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unfiltered = stream

    def write(self, text: str) -> int:
        self.unfiltered.write(_COLOURS_OR_CONTROLS.sub(lambda match: match[1] or "�", text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


def drop_bad_size() -> None:
    """Removes COLUMNS and LINES from the environment where they are no size: with COLUMNS=0, Rich prints nothing."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch(r"0*[1-9][0-9]{0,3}", os.environ.get(name, "1")):
            del os.environ[name]
