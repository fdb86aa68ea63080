"""The console as a user meets it: in a pipe, in dumb terminals, and in a real one (tmux)."""

import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlopt.basics import formats
from dlopt.tracking.console import open_console
from dlopt.tracking.metrics import read_metrics, read_summary
from tests.support.requires import requires

DRIVE = Path(__file__).with_name("drive.py")
ROOT = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | changes


def run(folder: Path, stdout: int | None = subprocess.PIPE, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DRIVE), str(folder)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        env=environment(**changes),
        timeout=60,
    )


@pytest.mark.parametrize("changes", [{}, {"TERM": "xterm-256color", "FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_pipe_gets_plain_lines(tmp_path: Path, changes: dict[str, str]) -> None:
    done = run(tmp_path, subprocess.PIPE, **changes)
    assert done.returncode == 0
    assert done.stderr == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout), "control characters"
    assert "━" not in done.stdout, "bars"
    lines = done.stdout.splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert [line.split()[0] for line in lines if re.match(r" +\d/3 ", line)] == ["1/3", "2/3", "3/3"]
    assert sum(line.split()[:3] == ["epoch", "step", "train"] for line in lines) == 1
    assert lines.count("* best epoch so far") == 1
    assert sum("sgd  lr 0.1" in line for line in lines) == 1
    assert sum("272,474 parameters" in line for line in lines) == 1
    assert "said to the user" in lines
    assert "a library's warning" in lines
    assert re.search(r"test +0\.3000 +97\.78 %", done.stdout)
    assert "tensorboard --logdir" in lines[-1] or "tensorboard.main --logdir" in lines[-1]


def test_an_ascii_pipe_gets_ascii(tmp_path: Path) -> None:
    done = run(tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "optimizer  sgd" in done.stdout


def whole(folder: Path) -> bool:
    summary = read_summary(folder)
    return summary is not None and summary["status"] == "finished" and len(read_metrics(folder)) == 3


def test_closed_pipe_does_not_end_the_training(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(tmp_path, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert whole(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_stdout_on_a_full_disk_does_not_end_the_training(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run(tmp_path, full.fileno())
    assert (done.returncode, done.stderr) == (0, "")
    assert whole(tmp_path)


def test_no_stdout_at_all(tmp_path: Path) -> None:
    done = run(tmp_path, DRIVE_WITHOUT_STDOUT="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert whole(tmp_path)


class Terminal:
    """A real terminal of `columns` x 50 in which `command` runs."""

    def __init__(self, columns: int, command: str) -> None:
        self.columns = columns
        self._name = f"dlopt-{os.getpid()}-{time.monotonic_ns()}"
        # The last line tells that the command has ended; without the trap Ctrl-C ends the shell, and the terminal, too.
        script = f"trap : INT; {command}; echo; echo rc=$?=; exec sleep 60"
        self._tmux("new-session", "-d", "-x", str(columns), "-y", "50", f"exec sh -c {shlex.quote(script)}")

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-L", self._name, "-f", "/dev/null", *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(), timeout=20).stdout

    def screen(self, *options: str) -> str:
        return self._tmux("capture-pane", "-p", *options)

    def wait(self, pattern: str) -> str:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            screen = self.screen()
            if re.search(pattern, screen, re.MULTILINE):
                return screen
            time.sleep(0.05)
        raise AssertionError(f"never saw {pattern!r} in\n{self.screen()}")

    def keys(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def cursor_shown(self) -> bool:
        return self._tmux("display", "-p", "#{cursor_flag}").strip() == "1"

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def open_terminal(terminals: list[Terminal], columns: int, folder: Path, seconds: float, prefix: str = "") -> Terminal:
    command = f"{prefix} {shlex.quote(sys.executable)} {shlex.quote(str(DRIVE))} {shlex.quote(str(folder))} 3 {seconds}"
    terminals.append(Terminal(columns, command))
    return terminals[-1]


@requires("tmux")
@pytest.mark.parametrize(
    "columns", [pytest.param(60, marks=pytest.mark.slow), 80, pytest.param(120, marks=pytest.mark.slow)]
)
def test_live_display_in_a_terminal(tmp_path: Path, terminals: list[Terminal], columns: int) -> None:
    terminal = open_terminal(terminals, columns, tmp_path / "run", 0.06)
    during = terminal.wait(r"^epoch +[23]/3 +\S*━.*left")
    assert not terminal.cursor_shown()
    display = during.rstrip().splitlines()[-4:]
    assert re.match(r"epoch +[23]/3  ━+[╸╺]?━* +0:\d\d left", display[0])
    assert re.match(r"(step +\d+/10|eval +1/1)  [━╸╺]+", display[1])
    assert re.match(r"train +loss \d\.\d+ +.*lr 0\.1   MFU 41\.70 %", display[2])
    assert columns < 80 or display[2].endswith("   memory 3.0 GiB")
    assert re.match(r"val +loss \d\.\d+ +accuracy 87\.50 %", display[3])

    after = terminal.wait(r"^rc=0=")
    assert terminal.cursor_shown()
    assert "━" not in after, "the display must be taken away"
    rows = [line for line in after.splitlines() if re.match(r" +\d/3 ", line)]
    assert len(rows) == 3
    assert all(row.rstrip().endswith("*") for row in rows), f"rows must not wrap: {rows}"
    assert [line for line in after.splitlines() if line.strip() == "said to the user"]
    assert [line for line in after.splitlines() if line.strip() == "a library's warning"]
    assert re.search(r"test +0\.3000 +97\.78 %", after)


@requires("tmux")
def test_ctrl_c_restores_the_terminal(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminal = open_terminal(terminals, 80, tmp_path, 0.1)
    terminal.wait(r"^step +[3-9]/10")
    assert not terminal.cursor_shown()
    terminal.keys("C-c")
    after = terminal.wait("KeyboardInterrupt")
    assert "━" not in after
    assert terminal.cursor_shown()
    assert "KeyboardInterrupt" in (tmp_path / "train.log").read_text()


@requires("tmux")
def test_no_color(tmp_path: Path, terminals: list[Terminal]) -> None:
    colour = r"\x1b\[[0-9;]*(3[0-7]|38|9[0-7])[0-9;]*m"
    for name, prefix in (("with", ""), ("without", "NO_COLOR=1")):
        terminal = open_terminal(terminals, 80, tmp_path / name, 0.0, prefix)
        terminal.wait(r"^rc=0=")
        assert bool(re.search(colour, terminal.screen("-e"))) == (name == "with")


@requires("tmux")
def test_a_dumb_terminal_of_60_columns_gets_short_lines(tmp_path: Path, terminals: list[Terminal]) -> None:
    terminal = open_terminal(terminals, 60, tmp_path, 0.0, "TERM=dumb")
    screen = terminal.wait(r"^rc=0=")
    rows = [line for line in screen.splitlines() if re.match(r" +\d/3 ", line)]
    assert [row.split()[:2] for row in rows] == [[f"{n}/3", formats.format_number(0.23 / n)] for n in (1, 2, 3)]
    assert all(row.endswith("*") and len(row) <= 60 for row in rows)


@pytest.mark.parametrize("columns", ["0", "00", "-1", "abc", "", "²", "99999999999"])
def test_a_width_that_is_none_counts_as_unset(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With COLUMNS=0, Rich folds every text into lines without characters."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    stream = io.StringIO()
    console = open_console(stream)[1]
    console.print("a header")
    assert stream.getvalue() == "a header\n" and console.width >= 40
    monkeypatch.setenv("COLUMNS", "0120")
    assert open_console(stream)[1].width == 120
