"""Times an update, its layers and an all-reduce while other processes run the same load.

Processes on one machine share its cores, caches and memory. `measure` starts them, each as
`python -m dlopt.lab.scaling.contention FOLDER`.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from dlopt.extend import RunConfig, RunError, build_workload, probe_trainer
from dlopt.instruments.measuring_ranks import run_rank, run_ranks
from dlopt.lab.scaling.layers import Layer, timed
from dlopt.lab.scaling.rank import seconds_of, updates_of
from dlopt.lab.scaling.simulation import Link
from dlopt.machine.memory import keep_freed_memory
from dlopt.machine.world import current
from dlopt.parallel.collectives import ModelGroup, all_reduce
from dlopt.parallel.mode import Mode
from dlopt.parallel.processes import rendezvous
from dlopt.parallel.processes.process_group import ProcessGroup
from dlopt.trained.distillation import with_teacher

SIZES = (64, 16 << 10, 256 << 10, 1 << 20, 4 << 20)  # bytes
_WARMUP, _UPDATES, _ROUNDS = 5, 60, 30


@dataclass(frozen=True)
class SharedTimes:
    """Times measured by several processes under the same load, in seconds."""

    updates: list[float]  # of every process, without communication
    layers: list[Layer]  # their times per sample add up to those of the median update
    link: Link  # fitted to all-reduces over these processes

    @property
    def variation(self) -> float:
        """Coefficient of variation of an update, from the median absolute deviation (times 1.4826 for normal ones)."""
        median = statistics.median(self.updates)
        return 1.4826 * statistics.median([abs(seconds - median) for seconds in self.updates]) / median


def measure(config: Mapping[str, Any], folder: Path, processes: int) -> SharedTimes:
    """Starts `processes` processes that each train on their own; times their updates, layers and all-reduces."""
    codes = run_ranks("dlopt.lab.scaling.contention", folder, config, processes, {})
    if any(codes):
        raise RunError(f"benchmark processes failed: exit codes {codes}")
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    updates = [seconds for rank in ranks for seconds in rank["updates"]]
    all_reduces = {size: statistics.mean(rank["all_reduces"][str(size)] for rank in ranks) for size in SIZES}
    layers = [Layer(**layer) for layer in ranks[0]["layers"]]
    per_sample = statistics.median(updates) / config["data"]["batch_size"]
    return SharedTimes(updates, scale_to(per_sample, layers), fit_link(all_reduces, processes))


def scale_to(update: float, layers: Sequence[Layer]) -> list[Layer]:
    """Scales the layers' times to add up to `update`, which distributes the loss and the optimizer over the layers."""
    factor = update / sum(layer.forward + layer.backward for layer in layers)
    return [replace(layer, forward=factor * layer.forward, backward=factor * layer.backward) for layer in layers]


def fit_link(times: Mapping[int, float], processes: int) -> Link:
    """Fits latency and bandwidth to the times of all-reduces (bytes -> seconds) by least squares of relative errors.

    Solves 2 (p-1) alpha + 2 (p-1)/p n/beta = t for alpha and beta, see `simulation.ring_all_reduce`.
    """
    sizes, seconds = np.array(list(times)), np.array(list(times.values()))
    terms = np.stack([np.full(len(sizes), 2.0 * (processes - 1)), 2 * (processes - 1) / processes * sizes], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(sizes)), rcond=None)
    return Link(max(float(latency), 1e-7), 1 / max(float(per_byte), 1e-13))


def _measure(run_config: RunConfig, folder: Path, rank: int) -> Mapping[str, Any]:
    world = current()
    assert world is not None
    torch.set_num_threads(1)
    keep_freed_memory()
    device = torch.device("cpu")
    ProcessGroup(world, device, minutes=2.0)
    workload = build_workload(run_config, parallel=Mode(device))
    trainer = probe_trainer(with_teacher(workload), folder / f"run-{rank}")
    update = updates_of(trainer, device)
    for _ in range(_WARMUP):
        update()
    distributed.barrier()  # all processes measure the same thing at the same time
    updates = [seconds_of(update) for _ in range(_UPDATES)]
    distributed.barrier()
    inputs, _ = next(iter(trainer.batches.epoch(0)))
    layers = [asdict(layer) for layer in timed(workload.module, inputs)]
    distributed.barrier()
    return {"updates": updates, "layers": layers, "all_reduces": _all_reduces(update)}


def _all_reduces(update: Callable[[], object]) -> dict[int, float]:
    """Returns bytes -> seconds that an all-reduce adds between two updates.

    This is more than an all-reduce alone takes, because the cores switch from computing to communicating and back.
    """
    ranks = ModelGroup()

    def mean_seconds(call: Callable[[], object]) -> float:
        distributed.barrier()  # ranks that start apart would measure the wait for each other
        return seconds_of(call, _ROUNDS) / _ROUNDS

    baseline, delays = mean_seconds(update), {}
    for size in SIZES:
        values = torch.zeros(size // 4)

        def delayed(values: Tensor = values) -> None:
            update()
            all_reduce(values, ranks)

        delays[size] = max(mean_seconds(delayed) - baseline, 1e-7)
    return delays


if __name__ == "__main__":
    rendezvous.end_process(run_rank(_measure, lambda error: None))
