"""`python -m dlopt.lab.scaling.rank FOLDER`: benchmarks one rank of the run in FOLDER/config.yaml.

Runs updates of the same trainer as `dlopt train` and writes FOLDER/rank-N.json.
"""

import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from dlopt.extend import RunConfig, Trainer, UserError, build_workload, probe_trainer
from dlopt.instruments.measuring_ranks import RankOutcome, run_rank
from dlopt.instruments.profiling import collective_times
from dlopt.lab.scaling.communication import Traffic
from dlopt.machine.memory import keep_freed_memory, process_memory
from dlopt.machine.threads import set_threads
from dlopt.parallel.mode import Mode
from dlopt.parallel.processes import rendezvous
from dlopt.trained.distillation import with_teacher
from dlopt.training.builders.workload import build_mode
from dlopt.training.progress import endless_batches

MIB = 2.0**20


@dataclass(frozen=True)
class ScalingSettings:
    """Options of `dlopt scaling` (parallel scaling) that each rank needs."""

    updates: int
    warmup: int
    profiled: int
    memory_limit_mb: float | None


def main() -> int:
    settings = ScalingSettings(**json.loads((Path(sys.argv[1]) / "plan.json").read_text()))

    def explain(error: Exception) -> RankOutcome | None:
        if isinstance(error, UserError):
            return {"refused": str(error)}, 2
        return ({"failed": _reason(error, settings)}, 1) if isinstance(error, RuntimeError | MemoryError) else None

    return run_rank(lambda run_config, folder, rank: measure(run_config, folder, settings, rank), explain)


def _reason(error: RuntimeError | MemoryError, settings: ScalingSettings) -> str:
    text = (str(error).splitlines() or [""])[0]
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text
    if is_memory or "alloc" in text:
        limit = "" if settings.memory_limit_mb is None else f" of {settings.memory_limit_mb:g} MiB above the baseline"
        return f"out of memory{limit}"
    return "another process failed" if rendezvous.caused_by_peer(error) else f"{type(error).__name__}: {text}"


def measure(run_config: RunConfig, folder: Path, settings: ScalingSettings, rank: int) -> Mapping[str, Any]:
    """Runs warm-up updates, timed updates, updates with bytes counted, and updates under the profiler.

    Returns the metrics that `modes.summarize` reads; times in seconds per update.
    """
    parallel = build_mode(run_config)
    device = parallel.device
    set_threads(run_config.settings.threads, parallel.ranks.local_processes)
    keep_freed_memory()
    torch.ones(64, 64).mm(torch.ones(64, 64))  # BLAS allocates its buffers on first use; they belong to the baseline
    baseline = _memory(device)
    if settings.memory_limit_mb is not None:
        _limit(settings.memory_limit_mb, device)
    workload = build_workload(run_config, parallel=parallel)
    trainer = probe_trainer(with_teacher(workload), folder / f"run-{rank}")
    update = updates_of(trainer, device)
    for _ in range(settings.warmup):
        update()
    _barrier(parallel)
    steps, samples = [], 0
    for _ in range(settings.updates):
        start = time.perf_counter()
        samples += update()
        steps.append(time.perf_counter() - start)
    peak = float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else float(process_memory("VmHWM"))
    with Traffic() as traffic:
        for _ in range(settings.profiled):
            update()
    communicating, waiting = _communication(update, settings.profiled, device, parallel)
    [all_ranks_samples] = parallel.ranks.sum([float(samples)])
    is_sharded = parallel.split.shard is not None
    return {
        "threads": torch.get_num_threads(),
        "samples": (all_ranks_samples if is_sharded else samples) / settings.updates,  # of the global batch
        "steps": steps,
        "peak_mb": (peak - baseline) / MIB,  # above the process before it built data and model
        "sent_mb": traffic.sent / settings.profiled / MIB,  # by this rank
        "collectives": traffic.collectives / settings.profiled,
        "communicating": communicating,
        "waiting": waiting,
    }


def updates_of(trainer: Trainer, device: torch.device) -> Callable[[], int]:
    """Returns a function that makes the next update, synchronizes with the device, and returns this rank's samples."""
    trainer.module.train()
    batches, progress = endless_batches(trainer.batches, trainer.progress), trainer.progress

    def update() -> int:
        batch = next(batches)
        trainer.run_update(batch, progress.step)
        progress.count(batch.count, batch.total, trainer.step.passes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(batch.targets)

    return update


def seconds_of(call: Callable[[], object], count: int = 1) -> float:
    """Returns the seconds of `count` calls together."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _communication(update: Callable[[], int], number: int, device: torch.device, parallel: Mode) -> tuple[float, float]:
    """Returns the fractions of time with a collective in flight, and with a collective in flight and no computation."""
    if parallel.ranks.processes == 1:
        return 0.0, 0.0
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=kinds) as profiler:
        _barrier(parallel)  # starting the profiler takes a different time on each rank
        seconds = seconds_of(update, number)
    events = list(profiler.events() or [])
    # Exclude events of the barrier and the profiler's start: the profiler's clock has a different origin.
    first = max((e.time_range.end for e in events), default=0.0) - seconds * 1e6
    communicating, waiting = collective_times([e for e in events if e.time_range.start >= first], device)
    return min(communicating / seconds, 1.0), min(waiting / seconds, 1.0)


def _barrier(parallel: Mode) -> None:
    """Starts the measured updates of all ranks together; otherwise the wait for a late one would be in the first."""
    if parallel.ranks.processes > 1:
        distributed.barrier()


def _memory(device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    return float(process_memory("VmRSS"))


def _limit(megabytes: float, device: torch.device) -> None:
    """Limits further allocations of this process; larger ones fail as if memory were exhausted."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(megabytes * MIB / total, 1.0), device)
        return
    data = int(process_memory("VmData") + megabytes * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))


if __name__ == "__main__":
    rendezvous.end_process(main())
