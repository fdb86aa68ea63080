"""Benchmarks the start-up of a sweep's short jobs: a new interpreter for each job, against one worker.

    python scripts/bench/workers.py [--rounds 5] [--jobs 4] [--json FILE] [arguments of dlopt train]

Alternates between JOBS runs of `python -m dlopt.run.job`, as a Slurm job with several processes starts them, and the
same JOBS runs in one worker of a submitted sweep. Reports CPU seconds (user and system) of all processes per job,
for the worker's first job and for each of the others, and wall-clock seconds; without the time in Slurm's queue. The
default job takes two updates, so that nearly all of its time is its start-up.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from dlopt.basics.folders import RunFolder
from dlopt.config.choices import config_folder
from dlopt.config.compose import Composer
from dlopt.config.resolve import choices_of, to_plain
from dlopt.parallel.processes.launch import python_module
from dlopt.run.record import describe
from dlopt.sweeps.jobs import DescribedPlan, Job
from dlopt.sweeps.slurm import Slurm
from dlopt.sweeps.submission import read, worker_command
from dlopt.sweeps.submitting import submit

LINE = ["device=cpu", "threads=1", "model=mlp", "model.widths=[8]", "data.subset=100", "epochs=1", "tracking=[]"]
Seconds = tuple[float, float]  # of CPU, of the wall clock


def measure(run: Callable[[], None]) -> Seconds:
    """Returns the seconds of a function whose processes, orphans included, become children of this process."""
    begin, used = time.perf_counter(), sum(os.times()[2:4])
    run()
    wall = time.perf_counter() - begin
    while True:  # the server of a worker ends after it
        try:
            os.wait()
        except ChildProcessError:
            return sum(os.times()[2:4]) - used, wall


def start(*command: str) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def fresh(folders: list[Path]) -> None:
    for folder in folders:
        start(*python_module("dlopt.run.job", str(folder)))


def warm(folders: list[Path]) -> None:
    sweep, settings = folders[0].parent, yaml.safe_load((config_folder() / "hydra/launcher/slurm.yaml").read_text())
    launcher = Slurm(**{key: value for key, value in settings.items() if key != "_target_"} | {"n_jobs": 0})
    jobs = [Job(number, RunFolder(folder), DescribedPlan({}, {}), "") for number, folder in enumerate(folders)]
    submit(sweep, launcher, jobs, workers=0)
    start(*worker_command(sweep, read(sweep), launcher))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options, words = parser.parse_known_args()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    overrides = words or LINE
    config = Composer().compose(overrides)
    saved, choices = to_plain(config, overrides)[1], choices_of(config)
    kinds = {"new interpreter": (fresh, 1), "worker, first job": (warm, 1), "worker": (warm, options.jobs)}
    times: dict[str, list[Seconds]] = {name: [] for name in kinds}
    for number in range(options.rounds + 1):
        for name, (run, count) in kinds.items():
            with tempfile.TemporaryDirectory() as base:
                folders = [Path(base) / str(index) for index in range(count)]
                for folder in folders:
                    describe(folder, saved, [], choices)
                seconds = measure(partial(run, folders))
            if number:  # the first round warms the file cache
                times[name].append(seconds)
    more = [tuple((b - a) / (options.jobs - 1) for a, b in zip(*pair, strict=True))
            for pair in zip(times["worker, first job"], times["worker"], strict=True)]  # fmt: skip
    times["worker, each later job"] = more
    for name in ("new interpreter", "worker, first job", "worker, each later job"):
        cpu, wall = (statistics.median(each[index] for each in times[name]) for index in (0, 1))
        print(f"{name:24} {cpu:.2f} s of CPU, {wall:.2f} s")
    ratios = [a[0] / b[0] for a, b in zip(times["new interpreter"], more, strict=True)]
    print(f"CPU of a new interpreter / of a later job in a worker: {statistics.median(ratios):.1f}x")
    print("load:", *(f"{value:.1f}" for value in os.getloadavg()))
    if options.json is not None:
        options.json.write_text(json.dumps(times, indent=2) + "\n")


if __name__ == "__main__":
    main()
