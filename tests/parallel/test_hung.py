"""Ranks that hang after a stop signal."""

import os
import signal
import threading
from pathlib import Path

import pytest

from dlopt.basics.interruption import Interruption
from dlopt.parallel.processes import hung
from dlopt.training.checkpoint.checkpoints import Checkpoints
from tests.support.checkpoints import state


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


def test_a_checkpoint_may_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk hangs for five times the limit after the signal, which comes while the file is written."""
    monkeypatch.setattr(hung, "HUNG_SECONDS", 0.1)
    monkeypatch.setattr(hung, "_POLL_SECONDS", 0.02)
    ended, waited = threading.Event(), []

    def fsync(descriptor: int) -> None:
        if not waited:
            os.kill(os.getpid(), signal.SIGUSR1)
            waited.append(ended.wait(0.5))

    monkeypatch.setattr("os.fsync", fsync)
    with Interruption(), hung.end_if_hung(ended.set):
        Checkpoints(tmp_path, keep=1, writes=True).save(state(1), best=False)
    assert waited == [False]
