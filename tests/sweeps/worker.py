"""One of several processes that work on a study, with jobs of a few milliseconds instead of trainings.

`python -m tests.sweeps.worker FOLDER TOTAL [URL]`. A job's objective depends on its values only. Appends to
FOLDER/log: "begin NUMBER", "end NUMBER". SEEDS: jobs of each trial; then, the first trial is enqueued.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from dlopt.basics.errors import DONE
from dlopt.basics.folders import RunFolder
from dlopt.config.overrides import parse_overrides
from dlopt.config.plan import Plan
from dlopt.sweeps import jobs, samplers
from dlopt.sweeps.jobs import Job
from dlopt.sweeps.pool import Pool, Process, run
from dlopt.sweeps.search import Search
from dlopt.sweeps.study import Study, StudySpec
from tests.sweeps.spaces import space

SECONDS = 0.02


def make_spec(total: int, url: str | None, *typed: str) -> StudySpec:
    searched = space(*(typed or ("lr=tag(log,interval(0.001,1))", "kind=a,b")))
    draw = samplers.random(space=searched, seed=0)
    return StudySpec(
        searched, ["best_val_loss"], ["minimize"], None, draw, samplers.none(), total, storage=url, name="s"
    )


def study_of(folder: Path, spec: StudySpec) -> Study:
    return Study(folder, spec, {"objective": list(spec.objectives)})


def note(folder: Path, line: str) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, f"{line}\n".encode())
    os.close(log)


class Short:
    """A job that takes `SECONDS`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.over = folder, time.monotonic() + SECONDS
        note(folder.parent, f"begin {folder.name}")

    def poll(self) -> int | None:
        if time.monotonic() < self.over:
            return None
        values = dict(line.split("=") for line in json.loads((self.folder / "overrides.json").read_text()))
        loss = float(values["lr"]) + (values["kind"] == "a") + 0.1 * int(values.get("seed", 0))
        note(self.folder.parent, f"end {self.folder.name}")
        (self.folder / "summary.json").write_text(json.dumps({"status": "finished", "best_val_loss": loss}))
        return 0

    def stop(self) -> None: ...

    def kill(self) -> None: ...


def prepare(job: Job) -> jobs.JobResult | None:
    if job.folder.has_ended():
        return jobs.result_of(job.folder, DONE)
    job.folder.path.mkdir(exist_ok=True)
    (job.folder.path / "overrides.json").write_text(json.dumps(job.plan.texts))
    return None


def start(slot: int, folder: Path, environment: Mapping[str, str]) -> Process:
    return Short(folder)


def make_job(folder: Path, overrides: Sequence[str], number: int, label: str) -> Job:
    return Job(number, RunFolder(folder / str(number)), plan(overrides), label)


def plan(overrides: Sequence[str]) -> Plan:
    """A plan that is not checked."""
    return Plan(tuple(parse_overrides(overrides)), {}, cast(Any, SimpleNamespace(config={})))


def _wait_for_others(folder: Path) -> None:
    """Waits for TOGETHER workers: jobs are done sooner than a process starts."""
    together = int(os.environ.get("TOGETHER", 1))
    note(folder, f"ready {os.getpid()}")
    deadline = time.monotonic() + 100
    while (folder / "log").read_text().count("ready ") < together and time.monotonic() < deadline:
        time.sleep(0.005)


def main(folder: Path, total: int, url: str | None) -> None:
    spec = make_spec(total, url)
    if seeds := int(os.environ.get("SEEDS", 0)):
        spec = replace(spec, seeds=[f"seed={seed}" for seed in range(seeds)], enqueued=[{"lr": 0.25, "kind": "b"}])
    study = study_of(folder, spec)
    _wait_for_others(folder)
    search = Search(spec, study, lambda *arguments: make_job(folder, *arguments))
    with mock.patch("dlopt.sweeps.pool.prepare", prepare):
        run(search, Pool(2, start, lambda folder: None, poll_seconds=0.005), search.overview)
    study.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
