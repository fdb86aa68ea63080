"""Ranks that hang after a stop signal."""

import os
import signal
import threading

import pytest

from dlopt.interruption import Interruption
from dlopt.parallel import hung


def test_ends_a_rank_that_hangs_after_a_stop_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hung, "HUNG_SECONDS", 0.1)
    ended = threading.Event()
    with Interruption() as interruption, hung.end_if_hung(ended.set):
        assert not ended.wait(1), "not before a signal"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ended.wait(60)
        assert interruption.reason == "SIGUSR1"
    assert signal.set_wakeup_fd(-1) == -1, "restored"
    assert not any(thread.name == "dlopt-hung" for thread in threading.enumerate())


def test_a_checkpoint_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hung, "HUNG_SECONDS", 0.0)
    positions: list[object] = []
    module = {"__name__": "dlopt.training.checkpoint", "note": lambda: positions.append(hung._main_position())}
    exec("def save(): note()", module)
    module["save"]()  # type: ignore[operator]
    assert positions == [None]
    positions.append(hung._main_position())
    assert positions[1] is not None
