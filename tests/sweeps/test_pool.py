"""The worker pool: shares of the cores, one GPU per job, and the loop that keeps all slots at work."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.folders import RunFolder
from dlopt.config.compose import Composer
from dlopt.config.plan import folder_name
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import Job, JobResult, labels, record_dead, result_of
from dlopt.sweeps.pool import Pool, build_checked, gpus, local
from dlopt.tracking.overview import Overview
from tests.sweeps.worker import plan

Started = list[tuple[Path, Mapping[str, str], set[int] | None]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    calls: Started = []
    monkeypatch.setattr(pools, "spawn", lambda *arguments: calls.append(arguments))
    return calls


def test_every_job_sees_one_gpu(started: Started, tmp_path: Path) -> None:
    pool = gpus(gpus=[0, "GPU-ab", 3], jobs_per_gpu=2, stop_on_failure=False)
    assert pool.slots == 6
    for slot in range(6):
        pool.start(slot, tmp_path, {"A": "1"})
    assert [each[1] for each in started] == [
        {"A": "1", "CUDA_VISIBLE_DEVICES": name} for name in ["0", "GPU-ab", "3"] * 2
    ]


def test_local_jobs_divide_the_cores(started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for jobs, shares in ((1, [None]), (2, [{0, 2, 4, 6}, {1, 3, 5, 7}]), (-1, [{i} for i in range(8)])):
        started.clear()
        pool = local(n_jobs=jobs, stop_on_failure=False)
        for slot in range(pool.slots):
            pool.start(slot, tmp_path, {})
        assert [each[2] for each in started] == shares
    assert local(n_jobs=20, stop_on_failure=False).slots == 20


@pytest.mark.parametrize(
    "launcher, settings, said",
    [
        (local, {"n_jobs": 0}, "n_jobs=0"),
        (local, {"n_jobs": "two"}, "n_jobs=two"),
        (local, {"jobs": 2}, "hydra.launcher.jobs"),
        (gpus, {"gpus": [0, 0], "jobs_per_gpu": 1}, "duplicate"),
        (gpus, {"gpus": [], "jobs_per_gpu": 1}, "no GPU"),
    ],
)
def test_launchers_reject_invalid_settings(launcher: Callable[..., Pool], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        build_checked(launcher, {"stop_on_failure": False, **settings})
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["serial", "joblib", "gpus", "slurm"])
def test_launchers_are_found_by_hydra(name: str) -> None:
    line = [f"hydra/launcher={name}"]
    config = Composer(words=line).compose(line, multirun=True)
    assert config.hydra.launcher._target_.startswith("hydra_plugins.dlopt_sweeps.")


# -- the loop


class Fake:
    """A job that ends after a few polls and leaves a summary; the first process of job 8 returns it."""

    alive: ClassVar[Counter[int]] = Counter()
    most: ClassVar[Counter[int]] = Counter()
    started: ClassVar[Counter[str]] = Counter()

    def __init__(self, slot: int, folder: Path, environment: Mapping[str, str]) -> None:
        self.slot, self.folder, self.looks, self.stopped = slot, folder, 3, False
        Fake.alive[slot] += 1
        Fake.started[folder.name] += 1
        Fake.most[slot] = max(Fake.most[slot], Fake.alive[slot])
        (folder / "metrics.jsonl").write_text('{"epoch": 1, "val_loss": 1.0}\n{"epoch": 2, "val_lo')

    def poll(self) -> int | None:
        self.looks -= 1
        if self.looks > 0 and not self.stopped:
            return None
        Fake.alive[self.slot] -= 1
        number = int(self.folder.name)
        if number == 3:
            return -9
        if number == 8 and Fake.started["8"] == 1:
            return "returned"
        status = "interrupted" if self.stopped else "finished"
        (self.folder / "summary.json").write_text(json.dumps({"status": status, "best_val_loss": float(number)}))
        return 75 if self.stopped else 0

    def stop(self) -> None:
        self.stopped = True

    def kill(self) -> None: ...


class Ten(pools.JobSource):
    """Ten jobs; one is stopped at its first epoch, one cannot be composed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.given = folder, 0
        self.results: dict[int, JobResult] = {}

    def next(self) -> Job | None:
        if self.is_exhausted():
            return None
        number, self.given = self.given, self.given + 1
        if number == 5:
            return Job(5, RunFolder(self.folder / "5"), UserError("cannot be composed"), "five")
        return Job(number, RunFolder(self.folder / str(number)), plan([]), f"job={number}")

    def is_exhausted(self) -> bool:
        return self.given == 10

    def should_stop(self, job: Job, metrics: Mapping[str, Any]) -> bool:
        assert metrics == {"epoch": 1, "val_loss": 1.0}  # no torn line
        return job.number == 7

    def ended(self, job: Job, result: JobResult) -> None:
        assert job.number not in self.results
        self.results[job.number] = result


def test_all_slots_work_and_no_job_stops_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_folder(job: Job) -> None:
        assert job.plan  # raises for a job that cannot be composed
        job.folder.path.mkdir(exist_ok=True)

    monkeypatch.setattr(pools, "prepare", make_folder)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    Fake.alive, Fake.most, Fake.started = Counter(), Counter(), Counter()
    source, overview, notes = Ten(tmp_path), Overview(10), []

    def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Fake:
        notes.append(overview.note)
        return Fake(slot, folder, environment)

    pools.run(source, Pool(3, start, lambda folder: None), overview)
    assert notes == ["loading PyTorch ...", *[""] * 9]  # the first start waits for it
    status = {number: result.status for number, result in source.results.items()}
    assert status == {i: "finished" for i in range(10)} | {3: "failed", 5: "failed", 7: "pruned"}
    assert Fake.most == {0: 1, 1: 1, 2: 1}  # one job at a time in each slot
    assert Fake.started == Counter(str(i) for i in (*range(5), *range(6, 10), 8))  # 5 cannot start, 8 starts twice
    assert "SIGKILL" in source.results[3].reason
    pruned = json.loads((tmp_path / "7/summary.json").read_text())
    assert (pruned["status"], pruned["pruned"], pruned["pruned_at_epoch"]) == ("stopped_early", True, 1)
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("job 8: ") for line in said) == 1
    assert "job 3 failed: killed by SIGKILL (out of memory?) | " in next(line for line in said if "job 3 f" in line)
    assert "10/10: 7 done, 1 pruned, 2 failed" in said[-1] and "best: job 0" in said[-1]


class Hung(Fake):
    """A job that notices no signal but SIGKILL; its sweep gets one."""

    killed: ClassVar[list[str]] = []

    def poll(self) -> int | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return -signal.SIGKILL if self.folder.name in Hung.killed else None

    def kill(self) -> None:
        Hung.killed.append(self.folder.name)


def test_kills_jobs_that_do_not_end_after_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also waits no longer for a job that a killed sweep has left."""
    monkeypatch.setattr(pools, "prepare", lambda job: job.folder.path.mkdir())
    monkeypatch.setattr(pools, "GRACE", 0.1)
    source = Ten(tmp_path)
    left = {tmp_path / "2": Hung(2, tmp_path, {})}
    with pytest.raises(KeyboardInterrupt):
        pools.run(source, Pool(3, Hung, left.get, poll_seconds=0.01), Overview(10))
    assert {number: result.status for number, result in source.results.items()} == {0: "interrupted", 1: "interrupted"}
    assert sorted(Hung.killed)[:2] == ["0", "1"]
    assert "killed 3 jobs that still ran 0.1 s after the signal" in capsys.readouterr().out


class Quick:
    """A job that finishes at its second poll; some starts send the sweep a signal."""

    started: ClassVar[Counter[str]] = Counter()
    signals: ClassVar[dict[int, signal.Signals]] = {100: signal.SIGTERM, 220: signal.SIGINT}

    def __init__(self, slot: int, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.polls, self.status = folder, 2, "finished"
        Quick.started[folder.name] += 1
        if number := Quick.signals.get(Quick.started.total()):
            os.kill(os.getpid(), number)

    def poll(self) -> int | None:
        self.polls -= 1
        if self.polls > 0:
            return None
        if self.status == "finished" or int(self.folder.name) % 2:  # else the signal came before the job had started
            (self.folder / "summary.json").write_text(json.dumps({"status": self.status}))
        return 0 if self.status == "finished" else 75

    def stop(self) -> None:
        self.status = "interrupted"

    def kill(self) -> None: ...


def test_300_jobs_after_two_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every job finishes once; only those that a signal has stopped start again."""
    monkeypatch.setattr("dlopt.sweeps.jobs.describe", lambda folder, *_: folder.mkdir(exist_ok=True))
    Quick.started = Counter()
    checked: Any = SimpleNamespace(saved={"steps": None, "epochs": 1}, typed=[], choices={}, environment={}, lines=[])
    jobs = [Job(number, RunFolder(tmp_path / str(number)), checked, f"job={number}") for number in range(300)]
    pool = Pool(3, Quick, lambda folder: None, poll_seconds=0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pools.run_jobs(jobs, 300, pool)
    assert pools.run_jobs(jobs, 300, pool) == dict.fromkeys(range(300), "finished")
    assert len(Quick.started) == 300 and 300 + 2 <= Quick.started.total() <= 300 + 2 * 3
    assert all(job.is_done for job in jobs)
    assert capsys.readouterr().out.count("resume with resume=auto") == 2


def test_result_of_exit_codes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert result_of(folder, 75).status == "interrupted"
    assert result_of(folder, 3).reason.startswith("exit code 3")
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    assert result_of(RunFolder(tmp_path / "other"), -36).reason == "killed by signal 36"  # one without a name
    (tmp_path / "summary.json").write_text('{"status": "finished", "best_val_loss": 1.0}')
    assert result_of(folder, 0).status == "finished"


def test_marks_a_dead_job_as_failed(tmp_path: Path) -> None:
    record_dead(RunFolder(tmp_path))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    record_dead(RunFolder(tmp_path))
    assert not (tmp_path / "summary.json").exists()  # it never began
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.pt").touch()
    record_dead(RunFolder(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_folders_are_sanitised() -> None:
    assert folder_name("lr=0.1,data.root=x y:z") == "lr=0.1,data.root=x_y_z"
    assert folder_name("a/b=[1,2]") == "a/b=_1,2_"
    for outside in ("../x", "/x", ""):
        with pytest.raises(UserError, match="below"):
            folder_name(outside)


def test_labels() -> None:
    assert labels([["a=1", "b=2"], ["a=1", "b=3"]]) == ["b=2", "b=3"]
    assert labels([["a=1"]]) == ["a=1"]
