"""Tests of asynchronous checkpoints."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dlopt.basics.errors import RunError
from dlopt.training.checkpoint.checkpoints import Checkpoints, load
from tests.support.checkpoints import names, state, with_checksums
from tests.support.runs import assert_same_run, at_update, in_fork, resume, same, start, terminate
from tests.support.sizes import RICH

ASYNC = "checkpoint.asynchronous=true"


@contextmanager
def slow_disk(seconds: float, fail: Callable[[int], bool] = lambda step: False) -> Iterator[list[int]]:
    """Delays writing; yields the steps written, in order."""
    written: list[int] = []
    original = torch.save

    def save(value: Any, file: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(seconds)
        if fail(value["progress"]["step"]):
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        original(value, file)
        written.append(value["progress"]["step"])

    with patch.object(torch, "save", save):
        yield written


def test_saves_the_state_at_the_time_of_the_call(tmp_path: Path) -> None:
    """`save` returns before the file is written: the disk waits for the end of the call."""
    checkpoints, returned, original = Checkpoints(tmp_path, asynchronous=True), threading.Event(), torch.save
    given = state(1)

    def save(value: Any, file: Any) -> None:
        assert returned.wait(300)
        original(value, file)

    with patch.object(torch, "save", save):
        checkpoints.save(given, best=True)
        given["model"]["weight"].zero_()
        given["progress"]["step"] = 99
        returned.set()
        checkpoints.wait()
    assert same({key: load(checkpoints.best).state[key] for key in state(1)}, state(1))
    assert names(checkpoints) == with_checksums("last.pt", "best.pt")


def test_writes_in_order(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3, asynchronous=True)
    with slow_disk(0.03) as written:
        for step in range(8, 12):
            checkpoints.save(state(step), best=step == 9)
        found = checkpoints.load_newest()
    assert written == [8, 9, 10, 11] and found is not None and found.step == 11
    assert load(checkpoints.best).step == 9
    assert names(checkpoints) == with_checksums("last.pt", "best.pt", "step-9.pt", "step-10.pt")


@pytest.mark.parametrize("ask", ["save", "wait", "load_newest", "has_best"])
def test_next_call_raises_the_error(tmp_path: Path, ask: str) -> None:
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    with slow_disk(0.0, lambda step: step == 2):
        checkpoints.save(state(1), best=False)
        checkpoints.save(state(2), best=False)
        with pytest.raises(RunError, match=r"last\.pt could not be written: .*No space left"):
            calls = {
                "save": lambda: checkpoints.save(state(3), best=False),
                "has_best": lambda: checkpoints.has_best(1, None),
            }
            calls.get(ask, getattr(checkpoints, ask))()
        checkpoints.wait()
    assert load(checkpoints.last).step == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_run_equals_a_synchronous_one(whole: Path, tmp_path: Path) -> None:
    with slow_disk(0.01) as written:
        assert start(tmp_path, *RICH, ASYNC, "checkpoint.every_steps=1")["status"] == "finished"
    assert written == sorted(written) and written[-1] == 16
    assert_same_run(tmp_path, whole)


def test_interrupted_run_waits_for_its_save(whole: Path, tmp_path: Path) -> None:
    with slow_disk(0.3), at_update(6, terminate):
        assert start(tmp_path, *RICH, ASYNC)["status"] == "interrupted"
    assert load(tmp_path / "checkpoints/last.pt").step == 6
    assert resume(tmp_path, *RICH, ASYNC)["resumed_from"] == [6]
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("step", [5, 10, 16])
def test_killed_during_a_write(whole: Path, tmp_path: Path, step: int) -> None:
    def until() -> None:
        with slow_disk(0.02), at_update(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            resume(tmp_path, *RICH, ASYNC, "checkpoint.every_steps=1")

    assert os.WTERMSIG(in_fork(until)) == signal.SIGKILL
    assert resume(tmp_path, *RICH, ASYNC)["status"] == "finished"
    assert_same_run(tmp_path, whole)


def test_full_disk_fails_the_run(whole: Path, tmp_path: Path) -> None:
    with slow_disk(0.0, lambda step: step == 12), pytest.raises(RunError, match="No space left"):
        start(tmp_path, *RICH, ASYNC)
    assert resume(tmp_path, *RICH, ASYNC)["resumed_from"] == [8]
    assert_same_run(tmp_path, whole)


def test_failed_run_waits_for_its_save(tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with slow_disk(0.2), at_update(5, fail), pytest.raises(ZeroDivisionError):
        start(tmp_path, *RICH, ASYNC)
    assert load(tmp_path / "checkpoints/last.pt").step == 4
    assert not [each for each in threading.enumerate() if each.name == "checkpoint"]
