"""A sweep on the screen: plain lines, the live overview."""

import io
import os

import pytest

from dlopt.tracking.overview import Overview
from tests.support.terminal import plain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError


def test_plain_lines_show_progress() -> None:
    stream = io.StringIO()
    overview = Overview(4, stream=stream)
    overview.started(0, "lr=0.1")
    overview.progress(0, {"epoch": 1, "val_accuracy": 0.5})
    overview.ended(0, "lr=0.1", "finished", {"best_val_accuracy": 0.75})
    overview.started(1, "lr=0.2")
    overview.ended(1, "lr=0.2", "failed", {}, "the loss\n is not finite")
    overview.ended(2, "lr=0.3", "stopped_early", {"best_val_accuracy": 0.875}, known=True)
    overview.started(3, "lr=0.4")
    overview.refresh()
    overview.ended(3, "lr=0.4", "pruned", {"best_val_accuracy": 0.99})
    overview.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "job 0: lr=0.1"
    assert lines[1].startswith("job 0 finished | best_val_accuracy 75.00 % | in 0:0")
    assert "1/4: 1 done, 0 failed | best: job 0 | 0:0" in lines[1] and lines[1].endswith(" left")
    assert lines[3].startswith("job 1 failed: the loss is not finite | 2/4: 1 done, 1 failed")
    assert lines[-1].endswith("4/4: 2 done, 1 pruned, 1 failed | best: job 2")  # a pruned job is never the best


def test_no_fold_is_the_best() -> None:
    stream = io.StringIO()
    overview = Overview(2, stream=stream)
    for fold, accuracy in enumerate([0.75, 0.5]):
        overview.ended(fold, f"data.fold={fold}", "finished", {"best_val_accuracy": accuracy})
    overview.close()
    assert "job 0 finished | best_val_accuracy 75.00 % | 1/2" in stream.getvalue() and "best:" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_stopped_sweep_has_no_time_left() -> None:
    stream = io.StringIO()
    overview = Overview(3, stream=stream)
    overview.started(0, "lr=0.1")
    overview.ended(0, "lr=0.1", "finished", {})
    overview.started(1, "lr=0.2")
    overview.ended(1, "lr=0.2", "interrupted", {})
    overview.close()
    assert stream.getvalue().endswith(" | 2/3: 1 done, 1 interrupted, 0 failed\n")


def test_a_silent_overview_prints_messages_only() -> None:
    for stream in (io.StringIO(), Terminal()):
        overview = Overview(2, stream=stream, silent=True)
        overview.started(0, "lr=0.1")
        overview.progress(0, {"epoch": 1})
        overview.ended(0, "lr=0.1", "failed", {}, "the loss is not finite")
        overview.ended(1, "lr=0.2", "finished", {}, known=True)
        overview.message("stopped")
        overview.refresh()
        overview.close()
        assert plain(stream.getvalue()) == "stopped\n"


def test_time_left_accounts_for_parallel_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("dlopt.tracking.overview.time.monotonic", lambda: now)
    stream = io.StringIO()
    overview = Overview(16, stream=stream)
    for number in range(2):
        overview.started(number, "")
    now += 1200
    overview.ended(0, "", "finished", {})
    overview.started(2, "")
    now += 60
    overview.ended(1, "", "finished", {})
    lines = [line for line in stream.getvalue().splitlines() if line.endswith(" left")]
    # 16 jobs of 20 minutes, two at once: 160 minutes in all, of which 20 and 21 have gone
    for line, minutes in zip(lines, (140, 139), strict=True):
        hours, rest, _ = line.removesuffix(" left").split(" | ")[-1].split(":")
        assert abs(60 * int(hours) + int(rest) - minutes) <= 5


def test_neither_jobs_nor_the_time_left_count_the_imports_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 70.0
    monkeypatch.setattr("dlopt.tracking.overview.time.monotonic", lambda: now)
    stream = io.StringIO()
    overview = Overview(5, stream=stream)
    overview.started(0, "")
    now += 40  # of PyTorch's imports
    overview.forked(0)
    now += 6
    overview.ended(0, "", "finished", {})
    overview.started(1, "")
    overview.forked(1)
    now += 8
    overview.ended(1, "", "finished", {})
    first, second = (line for line in stream.getvalue().splitlines() if line.endswith(" left"))
    assert "| in 0:06 |" in first and first.endswith(" | 0:24 left")
    assert "| in 0:08 |" in second and second.endswith(" | 0:21 left")


def test_live_overview_shows_running_and_best_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    overview = Overview(3, stream=stream)
    overview.started(0, "lr=0.1")
    overview.ended(0, "lr=0.1", "finished", {"best_val_loss": 0.5})
    overview.started(1, "lr=0.2")
    overview.progress(1, {"epoch": 4, "train_loss": 0.25, "val_loss": 0.3})
    overview.refresh()
    shown = stream.getvalue()
    assert "best   val_loss 0.5000  job 0: lr=0.1" in shown
    assert "job 1  lr=0.2  epoch 4  val_loss 0.3000  train_loss 0.2500" in shown
    assert "1/3: 1 done, 1 running, 0 failed" in shown
    assert plain(shown).endswith("\n")  # the terminal prints ^C in an empty line
    overview.close()
    overview.close()


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_terminal_wraps_between_words(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    overview = Overview(18, stream=stream)
    label = "optimizer=adamw optimizer.lr=0.12369483267621112 optimizer.weight_decay=0.0005 seed=1"
    ended = ["job 3 finished", "best_val_accuracy 98.61 %", "in 0:01", label.replace("0.12369483267621112", "0.1237")]
    overview.started(3, label)
    overview.ended(3, label, "finished", {"best_val_accuracy": 0.9861})
    overview.started(4, label)
    overview.refresh()
    overview.close()
    lines = [line.rstrip() for line in plain(stream.getvalue()).splitlines()]
    assert max(map(len, lines)) <= columns
    begin = next(i for i, line in enumerate(lines) if line.startswith("job 3 finished"))
    assert " ".join(lines[begin : begin + 2]).startswith(" | ".join(ended).rsplit(" | in ")[0])
    words = {word for line in lines for word in line.split()}
    assert set(label.replace("0.12369483267621112", "0.1237").split()) <= words
    assert any("1/18: 1 done, 1 running, 0 failed" in line and line.endswith(" left") for line in lines)


def test_closed_terminal_does_not_raise() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        overview = Overview(1, stream=stream)
        overview.started(0, "x")
        overview.ended(0, "x", "finished", {})
        overview.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
