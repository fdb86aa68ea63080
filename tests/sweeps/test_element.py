"""The jobs of an element of the array of a submitted grid."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.files import write_yaml
from dlopt.basics.locks import hold
from dlopt.sweeps import element as elements
from dlopt.sweeps.array import JobEntry
from dlopt.sweeps.element import RESTARTS, Element
from dlopt.sweeps.jobs import Job, JobResult


def write_job(sweep: Path, number: int, summary: dict[str, Any] | None = None, **config: Any) -> None:
    folder = sweep / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / "config.yaml", {"epochs": 3, "steps": None, "allow_packages": [], **config})
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))


def element(sweep: Path, *numbers: int, restarts: int = 3) -> Element:
    jobs = {number: JobEntry(str(number), f"seed={number}", "epochs=3") for number in numbers}
    return Element(sweep, jobs, {"A": "1"}, ["mine"], restarts)


def take(source: Element) -> list[Job]:
    return [*iter(source.next, None)]


def test_what_is_run(tmp_path: Path) -> None:
    """Jobs that have not begun or were interrupted; not those that have ended, or run in another process."""
    write_job(tmp_path, 0)
    write_job(tmp_path, 1, {"status": "interrupted", "steps": 4})
    write_job(tmp_path, 2, {"status": "finished", "epochs": 3})
    write_job(tmp_path, 3, {"status": "failed", "reason": "diverged"})
    write_job(tmp_path, 4)
    write_job(tmp_path, 5, {"status": "finished", "epochs": 2})  # shorter than it was submitted now
    lock = hold(tmp_path / "4/.lock")
    source = element(tmp_path, *range(6))
    jobs = take(source)
    assert [job.number for job in jobs] == [0, 1, 5]
    assert jobs[0].label == "seed=0" and jobs[0].checked.environment == {"A": "1"}
    assert source.has_failed and not source.has_jobs_left()
    assert not (tmp_path / "1/summary.json").exists() and (tmp_path / "3/summary.json").exists()
    lock.close()
    assert [job.number for job in take(element(tmp_path, 4))] == [4]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job that cannot be started fails by name, and the element takes the next one."""
    write_job(tmp_path, 0)
    write_job(tmp_path, 1)
    write_json = elements.write_json

    def write(path: Path, value: Any) -> None:
        if path.parent.name == "0":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    monkeypatch.setattr(elements, "write_json", write)
    first, second = take(element(tmp_path, 0, 1))
    assert str(first.composed) == f"{tmp_path}/0/{RESTARTS}: No space left on device"
    assert second.number == 1 and not isinstance(second.composed, UserError)


def test_a_stopped_job_is_left(tmp_path: Path) -> None:
    """With its process; not if it was stopped by its own max_time."""
    write_job(tmp_path, 0)
    source = element(tmp_path, 0)
    [job] = take(source)
    source.ended(job, JobResult("interrupted", {}))
    assert not source.has_jobs_left()
    source.is_stopping = True
    source.ended(job, JobResult("interrupted", {}))
    assert source.has_jobs_left() and not source.has_failed


def test_restarts_without_progress(tmp_path: Path) -> None:
    """After two, a job ends as interrupted; an update, or another checkpoint of a killed job, is progress."""
    write_job(tmp_path, 0)
    checksum = tmp_path / "0/checkpoints/last.pt.sha256"
    checksum.parent.mkdir()
    for reached in ("", "a", "b"):
        if reached:
            checksum.write_text(reached)
        for _ in range(3):
            assert len(take(element(tmp_path, 0, restarts=2))) == 1
    for steps in (5, 7):
        for _ in range(3):
            write_job(tmp_path, 0, {"status": "interrupted", "steps": steps})
            assert len(take(element(tmp_path, 0, restarts=2))) == 1
    write_job(tmp_path, 0, {"status": "interrupted", "steps": 7})
    for _ in range(2):
        assert take(element(tmp_path, 0, restarts=2)) == []
    (tmp_path / "0/summary.json").unlink()
    (tmp_path / "0" / RESTARTS).write_text('{"reached": "b", "count": 2}')
    assert take(element(tmp_path, 0, restarts=2)) == []
    summary = json.loads((tmp_path / "0/summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("interrupted", "no progress in 2 restarts")


def test_what_a_job_may_be(tmp_path: Path) -> None:
    """Only a folder of the sweep, and only with packages that were submitted."""
    write_job(tmp_path, 0, allow_packages=["mine", "os"])
    [job] = take(element(tmp_path, 0))
    with pytest.raises(UserError, match=r"allow_packages=\['os'\]: not submitted with this sweep"):
        job.checked  # noqa: B018
    (tmp_path / "1").symlink_to(tmp_path / "0")
    with pytest.raises(UserError, match="link"):
        element(tmp_path, 1).next()
