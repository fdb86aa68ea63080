"""`python -m dlopt.analysis.bench.rank FOLDER`: one rank's measurement of what FOLDER/config.yaml says.

It takes the updates of a run, with the run's own objects, and writes FOLDER/rank-N.json.
"""

import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed

from dlopt.analysis.bench import communication
from dlopt.analysis.ranks import RankOutcome, run_rank
from dlopt.config.experiment import Experiment
from dlopt.errors import UserError
from dlopt.parallel import rendezvous
from dlopt.parallel.mode import Mode
from dlopt.processor import keep_freed_memory, set_threads
from dlopt.training.build import build_workload, parallel_of
from dlopt.training.trainer import Trainer, dry_run

MIB = 2.0**20


@dataclass(frozen=True)
class Plan:
    """What is measured; see `dlopt bench`."""

    updates: int
    warmup: int
    profiled: int
    memory_limit_mb: float | None


@dataclass(frozen=True)
class Measured:
    """One rank's figures; times in seconds, per update."""

    rank: int
    processes: int
    threads: int
    samples: float  # of the global batch
    steps: list[float]
    peak_mb: float  # memory beyond that of the process before its data and model were made
    sent_mb: float  # bytes that this rank sends
    collectives: float
    communicating: float  # share of the time in which a collective is under way
    waiting: float  # share of it in which nothing is computed besides

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    @property
    def own(self) -> float:
        """The time in which this rank works by itself: the slowest rank sets the pace of the others."""
        return self.step * (1 - self.waiting)


def main() -> int:
    plan = Plan(**json.loads((Path(sys.argv[1]) / "plan.json").read_text()))

    def explain(error: Exception) -> RankOutcome | None:
        if isinstance(error, UserError):
            return {"refused": str(error)}, 2
        return ({"failed": _reason(error, plan)}, 1) if isinstance(error, RuntimeError | MemoryError) else None

    return run_rank(lambda experiment, folder, rank: asdict(measure(experiment, folder, plan, rank)), explain)


def _reason(error: RuntimeError | MemoryError, plan: Plan) -> str:
    text = (str(error).splitlines() or [""])[0]
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text
    if is_memory or "alloc" in text:
        limit = "" if plan.memory_limit_mb is None else f" of {plan.memory_limit_mb:g} MiB beyond the bare process"
        return f"out of memory{limit}"
    return "another process ended" if rendezvous.comes_from_others(error) else f"{type(error).__name__}: {text}"


def measure(experiment: Experiment, folder: Path, plan: Plan, rank: int) -> Measured:
    """Warm-up, timed updates, updates whose bytes are counted, updates under the profiler."""
    parallel = parallel_of(experiment)
    device = parallel.device
    set_threads(experiment.settings.threads, parallel.local_processes)
    keep_freed_memory()
    torch.ones(64, 64).mm(torch.ones(64, 64))  # the libraries have their own
    before = _memory(device)
    if plan.memory_limit_mb is not None:
        _limit(plan.memory_limit_mb, device)
    workload = build_workload(experiment, parallel=parallel)
    trainer = dry_run(workload, folder / f"run-{rank}")
    update = updates_of(trainer, device)
    for _ in range(plan.warmup):
        update()
    _together(parallel)
    steps, samples = [], 0
    for _ in range(plan.updates):
        start = time.perf_counter()
        samples += update()
        steps.append(time.perf_counter() - start)
    peak = _peak(device)
    with communication.Traffic() as traffic:
        for _ in range(plan.profiled):
            update()
    talking, waiting = _profiled(update, plan.profiled, device, parallel)
    [all_ranks_samples] = parallel.sum_over_ranks([float(samples)])
    shared = parallel.batch_shard is not None
    return Measured(
        rank=rank,
        processes=parallel.processes,
        threads=torch.get_num_threads(),
        samples=(all_ranks_samples if shared else samples) / plan.updates,
        steps=steps,
        peak_mb=(peak - before) / MIB,
        sent_mb=traffic.sent / plan.profiled / MIB,
        collectives=traffic.collectives / plan.profiled,
        communicating=talking,
        waiting=waiting,
    )


def updates_of(trainer: Trainer, device: torch.device) -> Callable[[], int]:
    """Returns a function that makes the next update, synchronizes with the device, and returns this rank's samples."""
    trainer.module.train()
    progress = trainer.progress

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from trainer.batches.epoch(progress.epoch, 0, progress.step)
            progress.epoch += 1

    batches = endless()

    def update() -> int:
        inputs, targets = next(batches)
        trainer.step.update(inputs, targets, progress.step, trainer.sums)
        progress.step += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(targets)

    return update


def _profiled(update: Callable[[], int], number: int, device: torch.device, parallel: Mode) -> tuple[float, float]:
    """Shares of the time: a collective is under way; and nothing is computed besides."""
    if parallel.processes == 1:
        return 0.0, 0.0
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=kinds) as profiler:
        _together(parallel)  # a profiler takes its time to start
        start = time.perf_counter()
        for _ in range(number):
            update()
        seconds = time.perf_counter() - start
    events = list(profiler.events() or [])
    first = max((e.time_range.end for e in events), default=0.0) - seconds * 1e6
    talking, waiting = communication.times([e for e in events if e.time_range.start >= first], device)
    return min(talking / seconds, 1.0), min(waiting / seconds, 1.0)


def _together(parallel: Mode) -> None:
    if parallel.processes > 1:
        distributed.barrier()


def _status(name: str) -> float:
    """Bytes of a line of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux: the maximum is all there is, of the process's life
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.0
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _memory(device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def _limit(megabytes: float, device: torch.device) -> None:
    """This process may allocate so much more; beyond it an allocation fails."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(megabytes * MIB / whole, 1.0), device)
        return
    data = int(_status("VmData") + megabytes * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))


if __name__ == "__main__":
    rendezvous.end_process(main())
