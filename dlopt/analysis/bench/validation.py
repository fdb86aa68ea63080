"""Calculated times per update against measured ones, with a few processes on this machine."""

import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dlopt.analysis.bench import layers, modes, network, simulation
from dlopt.analysis.bench.layers import Layer
from dlopt.analysis.bench.simulation import Cluster
from dlopt.config.compose import Composer, to_plain
from dlopt.config.experiment import parse

BATCH, SHAPE = 64, (1, 8, 8)  # of the digits
_COMMON = ["model=resnet20", f"data.batch_size={BATCH}", "device=cpu", "threads=1", "data.workers=0"]
_PLAN = {"updates": 20, "warmup": 3, "profiled": 2, "memory_limit_mb": None}


@dataclass(frozen=True)
class Point:
    """Seconds per update."""

    mode: str
    processes: int
    calculated: float
    measured: float


def validate(processes: Sequence[int]) -> list[Point]:
    """Data parallelism, and model parallelism where filters can be split, of a ResNet-20 on the digits.

    Calculated from layer times and the varying of one process, from the times of all-reduces of any size, and from
    the number of cores, which more processes than cores share. What one process needs beyond its layers (sums of
    residual blocks, loss, optimizer) is added as it is.
    """
    composer = Composer()
    folder = Path(tempfile.mkdtemp(prefix="dlopt-bench-"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = _measured(composer, folder / "single", "single", 1)
        whole = _layers(composer, BATCH)
        rest = max(statistics.median(alone) - sum(layer.forward + layer.backward for layer in whole), 0.0)
        points = []
        for count in processes:
            if count == 1:
                continue
            cluster = _cluster(count, alone)
            crowded = max(1.0, count / len(os.sched_getaffinity(0)))
            data = _crowded(_layers(composer, BATCH // count), crowded)
            calculated = {"ddp": simulation.ddp(data, BATCH / count, count, cluster)}
            if "filter" in composer.choices("parallel"):
                split = _crowded(whole, crowded)
                calculated["filter"] = simulation.filter_parallel(split, BATCH / count, count, cluster, count)
            for mode, each in calculated.items():
                found = _measured(composer, folder / f"{mode}-{count}", mode, count)
                points.append(Point(mode, count, each.step + crowded * rest, statistics.median(found)))
        return points
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)


def _measured(composer: Composer, folder: Path, mode: str, processes: int) -> list[float]:
    overrides = [*_COMMON, f"parallel={mode}"]
    saved = to_plain(composer.compose(overrides), overrides)[1]
    return modes.steps_of(saved, folder, mode, processes, _PLAN)


def _layers(composer: Composer, samples: int) -> list[Layer]:
    experiment = parse(to_plain(composer.compose(_COMMON), _COMMON)[0])
    module = experiment.model.build(input_shape=SHAPE, classes=10).to(memory_format=torch.channels_last)
    inputs = torch.randn(samples, *SHAPE).to(memory_format=torch.channels_last)
    return layers.timed(module, inputs)


def _crowded(layers: Sequence[Layer], factor: float) -> list[Layer]:
    return [replace(each, forward=each.forward * factor, backward=each.backward * factor) for each in layers]


def _cluster(processes: int, steps: Sequence[float]) -> Cluster:
    link = network.measured(processes)
    middle = statistics.median(steps)
    around = statistics.median([abs(each - middle) for each in steps])  # a robust standard deviation: 1.4826 of this
    return Cluster(
        per_server=processes,
        tflops=1.0,  # not asked for: all layers are timed
        memory_bandwidth=1e6,  # the optimizer's time is in what is added
        memory=1e6,
        bandwidth_within=link.bandwidth / 1e9,
        latency_within=link.latency * 1e6,
        bandwidth_between=link.bandwidth / 1e9,
        latency_between=link.latency * 1e6,
        variation=1.4826 * around / middle,
        value_bytes=4,
        micro_batches=1,
        bucket_mb=25.0,
    )
