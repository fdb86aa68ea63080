"""A sweep that is killed at random moments and restarted gives the same results as an uninterrupted one."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlopt.basics.folders import RunFolder
from dlopt.training.checkpoint.checkpoints import load
from tests.support.ranks import ROOT
from tests.support.runs import same, timeless

LINE = [
    "model=mlp", "model.widths=[8]", "data.subset=100", "threads=1", "tracking=[]", "epochs=40", "seed=0,1",
    "optimizer.lr=0.01,0.1", "log_every_steps=null", "resume=auto",
]  # fmt: skip


def begin(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dlopt", "train", "-m", *LINE, f"hydra.sweep.dir={folder}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of an uninterrupted sweep, and the seconds that it took."""
    folder, start = tmp_path_factory.mktemp("whole"), time.monotonic()
    sweep = begin(folder)
    said, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, said
    return folder, time.monotonic() - start


@pytest.mark.slow
def test_kills_at_random_moments(whole: tuple[Path, float], tmp_path: Path) -> None:
    draw, killed = random.Random(3), 0
    for is_first in (True, False, False):
        sweep = begin(tmp_path / "killed")
        if is_first:  # in the middle of a job
            while not list(tmp_path.glob("killed/1/metrics.jsonl")) and sweep.poll() is None:
                time.sleep(0.05)
        else:
            time.sleep(draw.uniform(0.1, 0.6) * whole[1])
        killed += sweep.poll() is None
        sweep.send_signal(signal.SIGKILL)
        sweep.communicate()
    assert killed > 0
    last = begin(tmp_path / "killed")
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0, said
    for number in range(4):
        ours, theirs = tmp_path / "killed" / str(number), whole[0] / str(number)
        assert timeless(ours) == timeless(theirs)
        metrics = [dict(RunFolder(folder).summary() or {}) for folder in (ours, theirs)]
        for each in metrics:
            assert each.pop("status") == "finished" and each.pop("seconds") > 0
            each.pop("resumed_from"), each.pop("run_id"), each.pop("peak_memory")
        assert metrics[0] == metrics[1]
        assert same(*(load(folder / "checkpoints/last.pt").model for folder in (ours, theirs)))
