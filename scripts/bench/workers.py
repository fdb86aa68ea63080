"""Benchmarks the start-up of a sweep's short jobs: a new interpreter for each job, against one element of an array.

    python scripts/bench/workers.py [--rounds 5] [--jobs 4] [--json FILE] [arguments of dlopt train]

Alternates between JOBS runs of `python -m dlopt.run.job`, as a Slurm job with several processes starts them, and the
same JOBS runs in one element of a submitted sweep. Reports CPU seconds (user and system) of all processes per job,
for the element's first job and for each of the others, and wall-clock seconds; without the time in Slurm's queue. The
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

from dlopt.parallel.processes.launch import python_module

LINE = ["device=cpu", "threads=1", "model=mlp", "model.widths=[8]", "data.subset=100", "epochs=1", "tracking=[]"]
SUBMIT = ["hydra/launcher=slurm", "hydra.launcher.n_jobs=0"]
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


def fresh(sweep: Path) -> None:
    for folder in sorted(sweep.glob("[0-9]*")):
        start(*python_module("dlopt.run.job", str(folder)))


def warm(sweep: Path) -> None:
    start(*python_module("dlopt", "sweep", "work", str(sweep)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options, words = parser.parse_known_args()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    overrides = words or LINE
    kinds = {"new interpreter": (fresh, 1), "element, first job": (warm, 1), "element": (warm, options.jobs)}
    times: dict[str, list[Seconds]] = {name: [] for name in kinds}
    for number in range(options.rounds + 1):
        for name, (run, count) in [*kinds.items()][: None if number else 1]:  # the first round warms the file cache
            with tempfile.TemporaryDirectory() as base:
                own = [*SUBMIT, f"hydra.sweep.dir={base}", f"seed=range(0,{count})"]
                start(*python_module("dlopt", "train", "-m", *own, *overrides))
                seconds = measure(partial(run, Path(base)))
            if number:
                times[name].append(seconds)
    more = [tuple((b - a) / (options.jobs - 1) for a, b in zip(*pair, strict=True))
            for pair in zip(times["element, first job"], times["element"], strict=True)]  # fmt: skip
    times["element, each later job"] = more
    for name in ("new interpreter", "element, first job", "element, each later job"):
        cpu, wall = (statistics.median(each[index] for each in times[name]) for index in (0, 1))
        print(f"{name:24} {cpu:.2f} s of CPU, {wall:.2f} s")
    ratios = [a[0] / b[0] for a, b in zip(times["new interpreter"], more, strict=True)]
    print(f"CPU of a new interpreter / of a later job in an element: {statistics.median(ratios):.1f}x")
    print("load:", *(f"{value:.1f}" for value in os.getloadavg()))
    if options.json is not None:
        options.json.write_text(json.dumps(times, indent=2) + "\n")


if __name__ == "__main__":
    main()
