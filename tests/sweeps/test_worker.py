"""The worker that runs several jobs in one Slurm job, and the sweep that gives it jobs."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import INTERRUPTED
from dlopt.sweeps import slurm as launcher
from dlopt.sweeps import worker as workers
from dlopt.sweeps.pool import Pool, build_pool
from dlopt.sweeps.worker import JOBS, LOG, Lines, Worker, create
from tests.sweeps.fake_slurm import SETTINGS, WriteTool


class Forked:
    """A job that ends at once with the code in its folder's name; one called `endless` runs until it is stopped."""

    order: list[tuple[str, Mapping[str, str]]]

    def __init__(self, folder: Path, environment: Mapping[str, str], cores: set[int] | None) -> None:
        self.order.append((folder.name, environment))
        self.code = None if folder.name == "endless" else int(folder.name)
        self.sentinel, self._end = os.pipe()
        if self.code is not None:
            os.close(self._end)

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.code = 75
        os.close(self._end)


@pytest.fixture
def mailbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(workers, "spawn", Forked)
    monkeypatch.setattr(workers, "warm_up", lambda: None)
    monkeypatch.setattr(workers, "_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(Forked, "order", [], raising=False)
    create(tmp_path / "worker")
    return tmp_path / "worker"


def give(mailbox: Path, *names: object, **more: Any) -> None:
    jobs = Lines(mailbox / JOBS)
    for number, name in enumerate(names):
        jobs.append(job=number, folder=f"jobs/{name}", environment={"NAME": str(name)})
    if more:
        jobs.append(**more)


def log(mailbox: Path) -> list[dict[str, Any]]:
    return Lines(mailbox / LOG).read()


def report(numbers: Mapping[int, int]) -> list[dict[str, int]]:
    return [line for n, code in numbers.items() for line in ({"started": n}, {"ended": n, "code": code})]


def test_runs_jobs_in_order_with_their_environments_and_leaves_when_idle(mailbox: Path) -> None:
    give(mailbox, 0, 1, 2)  # failures and user errors do not end a worker
    assert Worker(mailbox, 3600.0).serve() == 2
    assert Forked.order == [("0", {"NAME": "0"}), ("1", {"NAME": "1"}), ("2", {"NAME": "2"})]
    assert log(mailbox) == [*report({0: 0, 1: 1, 2: 2}), {"left": True}]


def test_leaves_after_a_crash(mailbox: Path) -> None:
    give(mailbox, -9, 0)
    assert Worker(mailbox, 3600.0).serve() == -9
    assert log(mailbox) == [*report({0: -9}), {"left": True}]


def test_leaves_if_the_next_job_may_not_fit(mailbox: Path) -> None:
    give(mailbox, 0, 0)
    Worker(mailbox, 0.0).serve()
    assert log(mailbox) == [*report({0: 0}), {"left": True}]


def test_the_sweep_stops_a_job_but_not_its_worker(mailbox: Path) -> None:
    give(mailbox, "endless", 0)
    threading.Timer(0.3, lambda: give(mailbox, stop=0)).start()
    Worker(mailbox, 3600.0).serve()
    assert log(mailbox) == [*report({0: 75, 1: 0}), {"left": True}]


def test_a_job_that_is_stopped_before_it_starts_does_not_run(mailbox: Path) -> None:
    give(mailbox, 0, stop=0)
    Worker(mailbox, 3600.0).serve()
    assert Forked.order == [] and log(mailbox) == [*report({0: 75}), {"left": True}]


@pytest.mark.parametrize(
    "number, names, last",
    [
        (signal.SIGUSR1, ["endless"], []),  # Slurm requeues the job
        (signal.SIGUSR1, [0, "endless"], [{"moved": 1}]),  # the sweep submits it again
        (signal.SIGTERM, [0, "endless"], []),  # cancelled
    ],
)
def test_a_signal_of_slurm_stops_the_job(
    number: signal.Signals, names: list[object], last: list[object], mailbox: Path
) -> None:
    give(mailbox, *names)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), number)).start()
    assert Worker(mailbox, 3600.0).serve() == 75
    assert log(mailbox) == [*report(dict.fromkeys(range(len(names) - 1), 0)), {"started": len(names) - 1}, *last]


def test_a_requeued_worker_resumes_the_job_that_has_not_ended(mailbox: Path) -> None:
    give(mailbox, 0, 0)
    for line in ({"started": 0}, {"ended": 0, "code": 0}, {"started": 1}):
        Lines(mailbox / LOG).append(**line)
    Worker(mailbox, 3600.0).serve()
    assert log(mailbox)[3:] == [*report({1: 0}), {"left": True}]


def test_an_incomplete_line_is_read_later(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"started": 0}\n{"end')
    lines = Lines(tmp_path / "log")
    assert lines.read() == [{"started": 0}] and lines.read() == []
    with (tmp_path / "log").open("a") as file:
        file.write('ed": 0, "code": 0}\n')
    assert lines.read() == [{"ended": 0, "code": 0}]


# -- the sweep


class Cluster:
    """Slurm's commands as scripts. Numbers of submitted jobs: 1, 2, ...; all of them run until `finish`."""

    def __init__(self, folder: Path, write_tool: WriteTool) -> None:
        self.folder, self._write = folder, write_tool
        (folder / "queue").touch()
        write_tool(
            "sbatch",
            f"echo x >> {folder}/submitted\nn=$(grep -c x {folder}/submitted)\n"
            f'echo "$n RUNNING" >> {folder}/queue\necho Submitted batch job $n',
        )
        write_tool("squeue", f"cat {folder}/queue")
        write_tool("scancel", f'echo "$@" >> {folder}/cancelled')

    def submitted(self) -> int:
        return len((self.folder / "submitted").read_text().splitlines())

    def finish(self) -> None:
        (self.folder / "queue").write_text("")

    def start(self, pool: Pool, name: str) -> tuple[Any, Callable[..., None]]:
        """Starts a job; also returns a function that reports in place of its worker."""
        folder = self.folder / name
        folder.mkdir()
        job = pool.start(0, folder, {"NAME": name})
        place = json.loads((folder / "slurm/worker.json").read_text())["folder"]
        return job, Lines(Path(place) / LOG).append


@pytest.fixture
def cluster(write_tool: WriteTool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(launcher, "_QUEUE_SECONDS", 0.0)
    monkeypatch.setattr(launcher, "_SUMMARY_SECONDS", 0.0)
    return Cluster(tmp_path, write_tool)


def test_a_free_worker_gets_the_next_job(cluster: Cluster) -> None:
    pool = build_pool(launcher.slurm, SETTINGS)
    first, say = cluster.start(pool, "a")
    say(started=0)
    assert first.poll() is None
    say(ended=0, code=0)
    assert first.poll() == 0
    second, _ = cluster.start(pool, "b")
    assert cluster.submitted() == 1 and (cluster.folder / "b/slurm/job_id").read_text() == "1\n"
    say(started=1)
    assert second.poll() is None
    second.stop()
    say(ended=1, code=75)
    assert second.poll() == 75 and not (cluster.folder / "cancelled").exists()
    pool.close()
    place = json.loads((cluster.folder / "b/slurm/worker.json").read_text())["folder"]
    jobs = Lines(Path(place) / JOBS).read()
    assert [line["environment"]["NAME"] for line in jobs[:2]] == ["a", "b"]
    assert jobs[2:] == [{"stop": 1}, {"close": True}]


@pytest.mark.parametrize("last", [{"left": True}, {"started": 1, "moved": 1}])
def test_a_job_that_its_worker_returns_gets_a_slurm_job_of_its_own(last: Mapping[str, Any], cluster: Cluster) -> None:
    pool = build_pool(launcher.slurm, SETTINGS)
    first, say = cluster.start(pool, "a")
    say(started=0)
    say(ended=0, code=0)
    assert first.poll() == 0
    second, _ = cluster.start(pool, "b")
    say(**last)
    assert second.poll() == "returned"
    again = pool.start(0, cluster.folder / "b", {})
    assert again.poll() is None and cluster.submitted() == 2
    assert (cluster.folder / "b/slurm/job_id").read_text() == "2\n"
    second.stop()
    assert second.poll() == INTERRUPTED


def test_a_job_whose_worker_dies_first_is_submitted_again(cluster: Cluster) -> None:
    pool = build_pool(launcher.slurm, SETTINGS)
    first, say = cluster.start(pool, "a")
    say(started=0)
    say(ended=0, code=0)
    assert first.poll() == 0
    second, _ = cluster.start(pool, "b")
    cluster.finish()
    assert second.poll() == "returned"


def test_a_worker_that_has_left_gets_no_job(cluster: Cluster) -> None:
    pool = build_pool(launcher.slurm, SETTINGS)
    first, say = cluster.start(pool, "a")
    for line in ({"started": 0}, {"ended": 0, "code": -9}, {"left": True}):
        say(**line)
    assert first.poll() == -9
    cluster.start(pool, "b")
    assert cluster.submitted() == 2


def test_another_sweep_finds_the_job_that_a_worker_runs(cluster: Cluster) -> None:
    pool = build_pool(launcher.slurm, SETTINGS)
    _, say = cluster.start(pool, "a")
    say(started=0)
    later = build_pool(launcher.slurm, SETTINGS)
    found = later.find(cluster.folder / "a")
    assert found is not None and found.poll() is None
    say(ended=0, code=0)
    assert found.poll() == 0 and later.find(cluster.folder / "a") is None  # though the worker is still in the queue


def test_jobs_of_several_processes_have_no_worker(cluster: Cluster) -> None:
    pool = build_pool(launcher.slurm, {**SETTINGS, "tasks_per_node": 2})
    folder = cluster.folder / "a"
    folder.mkdir()
    job = pool.start(0, folder, {})
    assert job.poll() is None and not (folder / "slurm/worker.json").exists()
    job.stop()
    assert (cluster.folder / "cancelled").read_text() == "--signal=TERM 1\n"
    cluster.finish()
    time.sleep(0.01)
    assert job.poll() == 1
