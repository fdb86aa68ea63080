"""The jobs of a submitted sweep, as several workers share them."""

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.errors import UserError
from dlopt.basics.files import write_yaml
from dlopt.basics.folders import RunFolder
from dlopt.sweeps.jobs import DescribedPlan, Job, JobResult
from dlopt.sweeps.queue import LOG, WORKERS, Log, Queue, alive, live_workers, name_worker


def submit(sweep: Path, count: int) -> Log:
    log = Log(sweep)
    for number in range(count):
        (sweep / str(number)).mkdir(parents=True)
        write_yaml(sweep / str(number) / "config.yaml", {"allow_packages": []})
    with log.locked():
        log.add(
            [
                Job(number, RunFolder(sweep / str(number)), DescribedPlan({}, {}), f"seed={number}")
                for number in range(count)
            ]
        )
    return log


def worker(sweep: Path, name: str, restarts: int = 3) -> Queue:
    return Queue(sweep, name, {"A": "1"}, ["mine"], restarts)


@contextmanager
def living(sweep: Path, *names: str) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(alive(sweep, name))
        yield


@given(
    moves=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["finished", "failed", "stop", "die"])), max_size=30
    )
)
def test_every_job_ends_once(moves: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers take, finish and return jobs, or die, in any order; then one worker runs what is left."""
    sweep = tmp_path_factory.mktemp("sweep")
    log, ended = submit(sweep, 4), Counter[int]()
    for index, (name, end) in enumerate(moves):
        with living(sweep, f"{name}-{index}"):
            queue = worker(sweep, f"{name}-{index}", restarts=100)
            if (job := queue.next()) is None:
                continue
            if end == "stop":
                queue.is_stopping = True
                queue.ended(job, JobResult("interrupted", {}))
            elif end != "die":
                queue.ended(job, JobResult(end, {}))
                ended[job.number] += 1
    with living(sweep, "last-0"):
        queue = worker(sweep, "last-0", restarts=100)
        while (job := queue.next()) is not None:
            queue.ended(job, JobResult("finished", {}))
            ended[job.number] += 1
        assert not queue.has_jobs_left()
    assert ended == Counter(range(4))
    assert set(log.read().counts()) <= {"finished", "failed"}


def test_a_job_of_a_living_worker_is_not_taken(tmp_path: Path) -> None:
    submit(tmp_path, 1)
    with living(tmp_path, "a-1"):
        first, second = worker(tmp_path, "a-1"), worker(tmp_path, "b-1")
        assert first.next() is not None and second.next() is None
        assert live_workers(tmp_path) == ["a-1"]
    assert live_workers(tmp_path) == [] and not list((tmp_path / WORKERS).glob("*-*.lock"))
    job = second.next()
    assert job is not None and (job.label, job.checked.environment) == ("seed=0", {"A": "1"})


def test_a_job_that_is_interrupted_again_and_again(tmp_path: Path) -> None:
    """By its workers: it ends as interrupted. By its own max_time: at once."""
    log = submit(tmp_path, 2)
    for _ in range(3):
        queue = worker(tmp_path, "a-1", restarts=2)
        job = queue.next()
        assert job is not None and job.number == 0
        queue.is_stopping = True
        queue.ended(job, JobResult("interrupted", {}))
    queue = worker(tmp_path, "a-1", restarts=2)
    job = queue.next()
    assert job is not None and job.number == 1 and log.read().jobs[0].status == "interrupted"
    queue.ended(job, JobResult("interrupted", {}))
    assert queue.next() is None and log.read().counts() == {"interrupted": 2}


def test_a_line_that_a_full_disk_has_cut(tmp_path: Path) -> None:
    log = submit(tmp_path, 2)
    with (tmp_path / WORKERS / LOG).open("ab") as file:
        file.write(b'{"claimed": 0, "wor')
    assert worker(tmp_path, "a-1").next() is not None
    (tmp_path / WORKERS / LOG).open("ab").write(b'[1]\n{"ended": 77, "status": "x"}\n\xff\n')
    assert log.read().counts() == {"running": 1, "queued": 1}


def test_what_a_job_may_be(tmp_path: Path) -> None:
    """Only a folder of the sweep, and only with packages that were submitted."""
    log = submit(tmp_path, 1)
    write_yaml(tmp_path / "0/config.yaml", {"allow_packages": ["mine", "os"]})
    job = worker(tmp_path, "a-1").next()
    assert job is not None
    with pytest.raises(UserError, match=r"allow_packages=\['os'\]: not submitted with this sweep"):
        job.checked  # noqa: B018
    (tmp_path / "link").symlink_to(tmp_path / "0")
    for folder in ("../0", "/tmp", "link"):
        with log.locked():
            log.append(job=1, folder=folder, label="")
        with pytest.raises(UserError, match=r"link|must be below"):
            worker(tmp_path, "b-1").next()


def take_all(sweep: Path, out: Path) -> None:
    name = name_worker()
    with alive(sweep, name):
        queue = worker(sweep, name)
        while (job := queue.next()) is not None:
            with out.open("a") as file:
                file.write(f"{job.number}\n")
            queue.ended(job, JobResult("finished", {}))


def test_a_thousand_jobs_and_three_processes(tmp_path: Path) -> None:
    """Each job is taken once; the files grow with the number of jobs, and not with the number of events."""
    sweep, count = tmp_path / "sweep", 1000
    log = submit(sweep, count)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=take_all, args=(sweep, tmp_path / str(number))) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    taken = [int(line) for number in range(3) for line in (tmp_path / str(number)).read_text().split()]
    assert sorted(taken) == list(range(count))
    assert log.read().counts() == {"finished": count}
    assert sorted(path.name for path in (sweep / WORKERS).iterdir()) == [LOG, "log.lock"]
    lines = (sweep / WORKERS / LOG).read_text().splitlines()
    assert len(lines) == 3 * count and all(len(line) < 120 and json.loads(line) for line in lines)
