"""`python -m dlopt.analysis.bench.contention FOLDER`: what an update, its layers and an all-reduce take one of several.

Processes of one machine share its cores, caches and memory: each is timed while the others do the same. From Python
`measured` starts them.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, distributed

from dlopt.analysis import model_summary as layers
from dlopt.analysis.bench.rank import updates_of
from dlopt.analysis.bench.simulation import Link
from dlopt.analysis.model_summary import Layer
from dlopt.analysis.ranks import run_rank
from dlopt.config.experiment import Experiment
from dlopt.errors import RunError
from dlopt.parallel import launch, rendezvous
from dlopt.parallel.collectives import Ranks, all_reduced
from dlopt.parallel.mode import Mode
from dlopt.parallel.process_group import Group
from dlopt.processor import keep_freed_memory
from dlopt.training.build import build_workload
from dlopt.training.trainer import dry_run

SIZES = (64, 16 << 10, 256 << 10, 1 << 20, 4 << 20)  # bytes
_WARMUP, _UPDATES, _ROUNDS = 5, 60, 30


@dataclass(frozen=True)
class Contention:
    """What several processes measured at the same time; seconds."""

    updates: list[float]  # each by itself
    layers: list[Layer]  # of an update; they add up to it
    link: Link  # that a ring over them sees

    @property
    def variation(self) -> float:
        """Standard deviation over mean of an update, from the median of distances (1.4826 for normal ones)."""
        middle = statistics.median(self.updates)
        return 1.4826 * statistics.median([abs(each - middle) for each in self.updates]) / middle


def measured(config: Mapping[str, Any], folder: Path, processes: int) -> Contention:
    """What `processes` take for updates of the experiment, each as if it were alone, and for telling each other."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    codes, _, asked = launch.run_processes(
        launch.python_module("dlopt.analysis.bench.contention", str(folder)), processes, {}
    )
    if asked:
        raise KeyboardInterrupt
    if any(codes):
        raise RunError(f"the processes that were to time each other ended with {codes}")
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    updates = [each for rank in ranks for each in rank["updates"]]
    return Contention(
        updates,
        shared_out(statistics.median(updates), [Layer(**each) for each in ranks[0]["layers"]]),
        fitted({size: statistics.mean(rank["all_reduces"][str(size)] for rank in ranks) for size in SIZES}, processes),
    )


def shared_out(update: float, layers: Sequence[Layer]) -> list[Layer]:
    """The layers with times that add up to the update's: each has its part of sums, loss and optimizer, too."""
    factor = update / sum(each.forward + each.backward for each in layers)
    return [replace(each, forward=factor * each.forward, backward=factor * each.backward) for each in layers]


def fitted(times: Mapping[int, float], processes: int) -> Link:
    """Latency and bandwidth that fit the times of all-reduces best (relative errors, least squares).

    2 (p-1) alpha + 2 (p-1)/p n/beta = t for the alpha and beta, see `costs.ring_all_reduce`.
    """
    sizes, seconds = np.array(list(times)), np.array(list(times.values()))
    terms = np.stack([np.full(len(sizes), 2.0 * (processes - 1)), 2 * (processes - 1) / processes * sizes], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(sizes)), rcond=None)
    return Link(max(float(latency), 1e-7), 1 / max(float(per_byte), 1e-13))


def _measure(experiment: Experiment, folder: Path, rank: int) -> Mapping[str, Any]:
    world = rendezvous.current()
    assert world is not None
    torch.set_num_threads(1)
    keep_freed_memory()
    device = torch.device("cpu")
    Group(world, device, minutes=2.0)
    workload = build_workload(experiment, parallel=Mode(device))
    trainer = dry_run(workload, folder / f"run-{rank}")
    update = updates_of(trainer, device)
    for _ in range(_WARMUP):
        update()
    distributed.barrier()
    updates = [_seconds(update) for _ in range(_UPDATES)]
    distributed.barrier()
    inputs, _ = next(iter(trainer.batches.epoch(0)))
    timed = layers.timed(workload.module, inputs)
    distributed.barrier()
    return {"updates": updates, "layers": [asdict(each) for each in timed], "all_reduces": _all_reduces(update)}


def _all_reduces(update: Callable[[], object]) -> dict[int, float]:
    """Bytes -> seconds by which one delays a process that takes an update before and after it.

    That is more than an all-reduce takes of processes that do nothing else: cores have to turn to it and back.
    """
    ranks = Ranks()

    def several(each: Callable[[], object]) -> float:
        distributed.barrier()
        return _seconds(lambda: [each() for _ in range(_ROUNDS)]) / _ROUNDS

    alone, found = several(update), {}
    for size in SIZES:
        values = torch.zeros(size // 4)

        def delayed(values: Tensor = values) -> None:
            update()
            all_reduced(values, ranks)

        found[size] = max(several(delayed) - alone, 1e-7)
    return found


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    rendezvous.end_process(run_rank(_measure, lambda error: None))
