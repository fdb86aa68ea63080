"""Benchmarks training on CPU cores that other processes use as well.

    python scripts/bench/contention.py [--json FILE] [--rounds 3] [--seconds 4] [--only default,mlp,gpt_nano,resnet20]
    python scripts/bench/contention.py --regions     # parallel regions of an update; needs a C compiler

Measures the time of an update alone, with two and four equal runs at once, and beside one busy single-threaded process:

- loop: a hand-written PyTorch loop of the same network, batch and optimizer, on one fixed batch;
- spinning: dlopt with all cores, whose threads spin while they wait for each other, as in PyTorch;
- dlopt: dlopt as it is (see dlopt/machine/openmp.py and `prefers_one_thread`).

All processes of a measurement train during the same seconds. The table shows medians over rounds, in which the
candidates take turns, relative to `spinning` alone (`loop`: to itself alone), and the worst process of all rounds.
"""

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.lab.scaling.rank import updates_of
from dlopt.machine import threads
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload

WORKLOADS = {
    "default": [],
    "mlp": ["model=mlp"],
    "gpt_nano": ["data=python_source", "model=gpt_nano", "optimizer=adamw"],
    "resnet20": ["data.image_size=32", "data.batch_size=128"],
}
CANDIDATES = ("loop", "spinning", "dlopt")
SITUATIONS = {"alone": (1, 0), "two at once": (2, 0), "four at once": (4, 0), "one busy process": (1, 1)}
GOALS = {"two at once": 2.5, "four at once": 5.0, "one busy process": 2.2}
_WARMUP = 10  # updates
_SETTLE = 1.0  # seconds until dlopt has noticed the other processes

# Counts the parallel regions that libgomp opens for more than one thread.
COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
static atomic_long regions;
long parallel_regions(void) { return regions; }
void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags) {
    static void (*original)(void (*)(void *), void *, unsigned, unsigned);
    if (!original) original = dlsym(RTLD_NEXT, "GOMP_parallel");
    if (threads != 1) atomic_fetch_add(&regions, 1);
    original(function, data, threads, flags);
}
"""


def build(workload: str, candidate: str) -> Callable[[], object]:
    """Returns a function that makes one update."""
    if candidate != "dlopt":
        threads.adapt_waiting = lambda threads: None
    lines = [*WORKLOADS[workload], "device=cpu", "steps=1000000"]
    if candidate != "dlopt":
        lines.append(f"threads={threads.usable_cores()}")
    built = build_workload(parse(*to_plain(Composer(words=lines).compose(lines))))
    trainer = probe_trainer(built, Path(os.devnull))
    if candidate != "loop":
        return updates_of(trainer, torch.device("cpu"))
    inputs, targets = next(iter(trainer.batches.epoch(0)))
    module = built.module.to(memory_format=torch.contiguous_format).train()
    reads_text = built.dataset.task.tokens is not None
    optimizer = (torch.optim.AdamW if reads_text else torch.optim.SGD)(module.parameters(), lr=1e-3)

    def update() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs).flatten(0, -2), targets.flatten()).backward()
        optimizer.step()

    return update


def work(workload: str, candidate: str, start: Path, seconds: float) -> None:
    """A process of a measurement: prints the seconds per update after `start` appears."""
    update = build(workload, candidate)
    for _ in range(_WARMUP):
        update()
    print("ready", flush=True)
    while not start.exists():
        time.sleep(0.005)
    begin = time.perf_counter()
    while time.perf_counter() - begin < _SETTLE:
        update()
    count, begin = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begin < seconds:
        update()
        count += 1
    print((time.perf_counter() - begin) / count, flush=True)


def measure(workload: str, candidate: str, situation: str, seconds: float) -> list[float]:
    """Returns the seconds per update of each process."""
    runs, busy = SITUATIONS[situation]
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        command = [sys.executable, __file__, "--work", workload, candidate, str(start), str(seconds)]
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(runs)
        ]
        others: list[subprocess.Popen[bytes]] = []
        try:
            for process in processes:
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            start.touch()
            return [float(process.stdout.readline()) for process in processes if process.stdout is not None]
        finally:
            started: list[subprocess.Popen[Any]] = [*processes, *others]
            for each in started:
                each.kill()
                each.wait()


def count_regions(workload: str, candidate: str) -> float:
    """Returns the parallel regions of an update, counted in a process that loads `COUNTER` before libgomp."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        sys.exit("--regions: needs a C compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "regions.c", Path(folder) / "regions.so"
        source.write_text(COUNTER)
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        command = [sys.executable, __file__, "--count", workload, candidate, str(library)]
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _count(workload: str, candidate: str, library: str) -> None:
    update = build(workload, candidate)
    for _ in range(_WARMUP):
        update()
    counted: Callable[[], int] = ctypes.CDLL(library).parallel_regions
    before = counted()
    for _ in range(_WARMUP):
        update()
    print((counted() - before) / _WARMUP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--regions", action="store_true")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--count", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        workload, candidate, start, seconds = arguments.work
        return work(workload, candidate, Path(start), float(seconds))
    if arguments.count:
        return _count(*arguments.count)
    workloads, console = arguments.only.split(","), Console()
    if arguments.regions:
        for workload in workloads:
            console.print(workload, {name: count_regions(workload, name) for name in CANDIDATES})
        return None
    results: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for workload in workloads:
            for situation in SITUATIONS:
                for candidate in CANDIDATES:
                    key = f"{workload}, {situation}, {candidate}"
                    results.setdefault(key, []).extend(measure(workload, candidate, situation, arguments.seconds))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    table = Table("workload", "situation", *CANDIDATES, "goal", title="time of an update, relative to alone (worst)")
    for workload in workloads:
        for situation in SITUATIONS:
            cells = []
            for candidate in CANDIDATES:
                alone = statistics.median(
                    results[f"{workload}, alone, {'loop' if candidate == 'loop' else 'spinning'}"]
                )
                values = [value / alone for value in results[f"{workload}, {situation}, {candidate}"]]
                cells.append(f"{statistics.median(values):.2f} ({max(values):.2f})")
            goal = GOALS.get(situation)
            table.add_row(workload, situation, *cells, "" if goal is None else f"<= {goal}")
    console.print(table)
    return None


if __name__ == "__main__":
    main()
