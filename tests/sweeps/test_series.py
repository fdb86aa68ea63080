"""Every kind of series: its file, its status, its end on request, and the command that continues it."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt.basics.errors import UserError
from dlopt.basics.folders import RunFolder
from dlopt.sweeps import pool as pools
from dlopt.sweeps import series
from dlopt.sweeps.array import STOP, STOP_RUN, WORKERS
from dlopt.sweeps.jobs import Job, JobResult
from dlopt.sweeps.pool import Pool
from dlopt.tracking.overview import Overview
from tests.support.line import SMALL, dlopt
from tests.support.processes import start_dlopt
from tests.sweeps.worker import plan


class Endless:
    """A job that ends when it is stopped."""

    def __init__(self, slot: int, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.is_stopped = folder, False

    def poll(self) -> int | None:
        if not self.is_stopped:
            return None
        (self.folder / "summary.json").write_text('{"status": "interrupted"}')
        return 75

    def stop(self) -> None:
        self.is_stopped = True

    def kill(self) -> None: ...


class Jobs(pools.JobSource):
    """Three jobs; `when_ended` is called with the number of one that has ended."""

    def __init__(self, folder: Path) -> None:
        self.series, self.waiting = folder, [0, 1, 2]
        self.ended_jobs: list[tuple[int, str, bool]] = []

    def next(self) -> Job | None:
        if not self.waiting:
            return None
        number = self.waiting.pop(0)
        assert self.series is not None
        return Job(number, RunFolder(self.series / str(number)), plan([]), f"job={number}")

    def ended(self, job: Job, result: JobResult) -> None:
        self.ended_jobs.append((job.number, result.status, self.is_stopping))


def test_one_run_and_then_the_series_end_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(job: Job) -> None:
        job.folder.path.mkdir(exist_ok=True)

    monkeypatch.setattr(pools, "prepare", make)
    source = Jobs(tmp_path)
    started = []

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Endless:
        started.append(int(folder.name))
        if len(started) == 2:
            (tmp_path / "0" / STOP_RUN).touch()
        if len(started) == 3:  # in the slot of job 0
            (tmp_path / WORKERS).mkdir()
            (tmp_path / WORKERS / STOP).write_text("by hand")
        return Endless(slot, folder, environment)

    with pytest.raises(KeyboardInterrupt):
        pools.run(source, Pool(2, start, lambda folder: None, poll_seconds=0.001), Overview(3, silent=True))
    assert started == [0, 1, 2]
    assert source.ended_jobs[0] == (0, "interrupted", False)  # the pool has gone on
    assert sorted(source.ended_jobs[1:]) == [(1, "interrupted", True), (2, "interrupted", True)]


def test_a_new_start_withdraws_the_request(tmp_path: Path) -> None:
    (tmp_path / WORKERS).mkdir()
    (tmp_path / WORKERS / STOP).write_text("by hand")
    series.begin(tmp_path, "benchmark", ["benchmark", "optimizer=sgd"], 4)
    assert not (tmp_path / WORKERS / STOP).exists()
    found = series.read(tmp_path)
    assert found == series.Series("benchmark", ("benchmark", "optimizer=sgd"), os.getcwd(), 4) and found.is_own


def finished(run: Path) -> None:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "summary.json").write_text('{"status": "finished", "epochs": 1}')


def test_the_status_of_a_series_that_is_no_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    series.begin(folder, "benchmark", ["benchmark", "optimizer=sgd"], 4)
    finished(folder / "digits/sgd/0/0")
    status = dlopt(tmp_path, "sweep", "status", "here")
    assert status.code == 75 and status.out.startswith("4 jobs: 1 finished, 3 queued\n")
    assert "to continue: dlopt sweep resume here\n" in status.out
    for number in range(1, 4):
        finished(folder / f"digits/sgd/0/{number}")
    assert dlopt(tmp_path, "sweep", "status", "here").code == 0


def test_a_series_of_a_stranger_runs_nothing(tmp_path: Path) -> None:
    content = {"kind": "grid", "command": ["train", "-m", "seed=0,1"], "cwd": str(tmp_path), "total": None}
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/series.yaml").write_text(yaml.safe_dump(content))
    said = dlopt(tmp_path, "sweep", "resume", "sweep")
    assert said.code == 2 and said.err == "dlopt: sweep: only the user who has started this series can resume it\n"
    (tmp_path / "sweep/series.yaml").write_text("kind: [1]\n")
    for verb in ("resume", "status"):
        said = dlopt(tmp_path, "sweep", verb, "sweep")
        assert said.code == 2 and said.err.startswith("dlopt: sweep/series.yaml: is damaged: ")


def test_nothing_to_stop(tmp_path: Path) -> None:
    series.begin(tmp_path, "grid", ["train", "-m", "seed=0,1"])
    finished(tmp_path / "0")
    with pytest.raises(UserError, match="no process runs this series"):
        series.stop(tmp_path, "by hand")
    with pytest.raises(UserError, match="0: not a running job of a series"):
        series.stop_run(tmp_path / "0")
    assert not (tmp_path / WORKERS / STOP).exists() and not (tmp_path / "0" / STOP_RUN).exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("grid", ["seed=0,1"]),
        ("search", ["hydra/sweeper=dlopt_optuna", "optimizer.lr=interval(0.01,0.1)", "hydra.sweeper.n_trials=2"]),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_stopped_series_resumes_by_its_own_command(kind: str, words: list[str], tmp_path: Path) -> None:
    """With the results of one that was not stopped, to the last bit."""
    line = ["train", "-m", *SMALL, "epochs=400", *words, "evaluate.every_epochs=4", "tracking=[]", "stopping=none"]
    whole = dlopt(tmp_path, *line, "hydra.sweep.dir=whole")
    assert whole.code == 0, whole.err
    process = start_dlopt(tmp_path, *line, "output=stopped", log=tmp_path / "log")
    try:
        wait_for(lambda: statuses(tmp_path).get("running", 0) > 0)
        run = next(path for path in (tmp_path / "stopped").glob("[01]") if RunFolder(path).is_live())
        assert dlopt(tmp_path, "sweep", "stop", str(run)).code == 0
        wait_for(lambda: not RunFolder(run).is_live())
        wait_for(lambda: statuses(tmp_path).get("running", 0) > 0 or process.exitcode is not None)
        stopped = dlopt(tmp_path, "sweep", "stop", "stopped")
        assert stopped.code == 0 or process.exitcode is not None, stopped
        process.join(60)
        assert process.exitcode == 75
    finally:
        process.kill()
    found = series.read(tmp_path / "stopped")
    assert found is not None and found.kind == kind
    resumed = dlopt(tmp_path, "sweep", "resume", "stopped")
    assert resumed.code == 0 and statuses(tmp_path) == {"finished": 2}, resumed
    for number in range(2):
        curves = [metrics(tmp_path / name / str(number)) for name in ("whole", "stopped")]
        assert curves[0] == curves[1] and len(curves[0]) == 100


def metrics(run: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["train_loss"], line["val_loss"]) for line in lines]


def statuses(folder: Path) -> dict[str, int]:
    result = dlopt(folder, "sweep", "status", "stopped", "--json")
    return json.loads(result.out)["counts"] if result.code in (0, 1, 75) else {}


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
