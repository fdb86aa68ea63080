"""Texts of strangers at a terminal: names of classes, columns and files that contain control codes."""

import io
import os
import pty

import pytest
from rich.table import Table

from dlopt import cli
from dlopt.basics.terminal_controls import TerminalStream
from dlopt.tracking.console import Screen, open_console

EVIL = "cat\x1b]0;title\x07\x1b[2J\x9b2J\r\u202egod"
SHOWN = "cat�]0;title��[2J�2J��god"


def test_prints_reach_a_terminal_without_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is printed without rich: colours stay, and pipes, which scripts read, get the text as it is."""
    main, side = pty.openpty()
    for descriptor, expected in ((side, SHOWN), (None, EVIL)):
        stream = io.StringIO() if descriptor is None else os.fdopen(side, "w", newline="")
        monkeypatch.setattr("sys.stdout", stream)
        cli._open_streams()
        print(EVIL, "\t\x1b[1;31mred\x1b[0m", flush=True)
        printed = stream.getvalue() if isinstance(stream, io.StringIO) else os.read(main, 1000).decode()
        assert printed == f"{expected} \t\x1b[1;31mred\x1b[0m\n".replace("\n", "\n" if descriptor is None else "\r\n")


@pytest.mark.parametrize("wrapped", [False, True])
def test_consoles_control_the_terminal_and_texts_do_not(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    raw = Terminal()
    stream = TerminalStream(raw) if wrapped else raw
    screen = Screen(stream)  # type: ignore[arg-type]
    screen.message(EVIL, "bold")
    table = Table("\x1b[2Jname")
    table.add_row(EVIL)
    screen._print_block(table)
    screen._start_live(lambda: "live", redirect=False)
    screen.close()
    printed = raw.getvalue()
    # rich itself removes some of the control characters.
    assert printed.startswith("\x1b[1mcat�]0;title�[2J�2J�god\x1b[0m\n") and "�[2Jname" in printed
    assert "\x1b[2J" not in printed and "\x07" not in printed and "\x9b" not in printed
    assert "live" in printed and "\x1b[?25l" in printed, "its own codes: the cursor is hidden"
    _, console, _ = open_console(io.StringIO())
    with console.capture() as capture:
        console.print(EVIL)
    assert "\x1b" not in capture.get()
