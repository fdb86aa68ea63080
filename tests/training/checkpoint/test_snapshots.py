"""Tests of snapshots at the end of each cycle of a schedule with restarts."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.interruption import Interruption
from dlopt.tasks.report import TestReport
from dlopt.training.builders.workload import Workload
from dlopt.training.checkpoint.checkpoints import load
from dlopt.training.progress import TrainingRun
from dlopt.training.run import Tools, train_run
from tests.support.runs import at_update, in_fork, resume, run_config, same, start
from tests.support.sizes import RICH

CYCLES = [*RICH, "schedule=cosine_restarts", "schedule.cycles=3", "schedule.T_mult=1", "epochs=6", "checkpoint.keep=1"]
SNAPSHOTS = [*CYCLES, "checkpoint.at_restarts=true"]  # 24 updates, 8 to a cycle


def snapshots(folder: Path) -> dict[str, int]:
    return {path.name: load(path).step for path in sorted((folder / "checkpoints").glob("restart-*.pt"))}


@pytest.fixture(scope="module")
def with_snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of SNAPSHOTS, which tests only read."""
    folder = tmp_path_factory.mktemp("snapshots")
    start(folder, *SNAPSHOTS)
    return folder


def test_saves_a_snapshot_at_the_end_of_each_cycle(with_snapshots: Path, tmp_path: Path) -> None:
    assert snapshots(with_snapshots) == {"restart-1.pt": 8, "restart-2.pt": 16, "restart-3.pt": 24}
    start(tmp_path / "short", *CYCLES, "epochs=2", "schedule_epochs=6")
    first = load(with_snapshots / "checkpoints/restart-1.pt")
    assert same(first.model, load(tmp_path / "short/checkpoints/last.pt").model)
    assert load(with_snapshots / "checkpoints/restart-2.pt").state["progress"]["lr"] < 0.05 * 0.1


def test_snapshots_do_not_change_the_run(with_snapshots: Path, tmp_path: Path) -> None:
    start(tmp_path, *CYCLES)
    kept, plain = (load(folder / "checkpoints/last.pt") for folder in (with_snapshots, tmp_path))
    assert same(kept.model, plain.model) and same(kept.optimizer, plain.optimizer)
    assert snapshots(tmp_path) == {}


@pytest.mark.parametrize("update", [8, 9])
def test_killed_run_has_the_same_snapshots(with_snapshots: Path, tmp_path: Path, update: int) -> None:
    def killed() -> None:
        with at_update(update, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            start(tmp_path, *SNAPSHOTS)

    assert os.WTERMSIG(in_fork(killed)) == signal.SIGKILL
    resume(tmp_path, *SNAPSHOTS)
    assert snapshots(tmp_path) == snapshots(with_snapshots)
    for name in snapshots(with_snapshots):
        states = [load(folder / "checkpoints" / name) for folder in (tmp_path, with_snapshots)]
        assert same(states[0].model, states[1].model), name


def test_draws_the_restarts_before_the_end(tmp_path: Path) -> None:
    drawn: list[float] = []

    def draw(workload: Workload, folder: Path, restarts: Sequence[float], tested: TestReport) -> dict[str, Path]:
        drawn.extend(restarts)
        return {}

    with Interruption() as interruption:
        train_run(TrainingRun(run_config(*CYCLES), tmp_path), interruption, Tools(draw=draw), console=False)
    assert drawn == [2, 4], "in epochs; a cycle also ends with the run, and nothing restarts"


def test_rejects_schedules_without_restarts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint.at_restarts=true.*cosine_restarts"):
        start(tmp_path, *RICH, "checkpoint.at_restarts=true", "schedule=cosine")


@pytest.mark.parametrize(
    "keys", [["schedule.T_0_epochs=1.5", "schedule.T_mult=2"], ["schedule=cosine_warmup_restarts"]]
)
def test_incomplete_last_cycle_has_no_snapshot(tmp_path: Path, keys: list[str]) -> None:
    """1.5 + 3 epochs of 4 updates, and the 1.5 that are left of the third cycle's 6."""
    start(tmp_path, *SNAPSHOTS, *keys)
    expected = [6, 18] if "T_0" in keys[0] else [8, 16, 24]
    assert list(snapshots(tmp_path).values()) == expected
    assert run_config(*SNAPSHOTS, *keys).settings.checkpoint.keep == 1
