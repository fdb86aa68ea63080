"""Calculated times per update against measured ones, with a few processes on this machine."""

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlopt.analysis.bench import company, modes, simulation
from dlopt.analysis.bench.company import Company
from dlopt.analysis.bench.simulation import Cluster
from dlopt.config.compose import Composer, to_plain

BATCH = 64
_COMMON = ["model=resnet20", "device=cpu", "threads=1", "data.workers=0"]
_PLAN = {"updates": 60, "warmup": 3, "profiled": 2, "memory_limit_mb": None}


@dataclass(frozen=True)
class Point:
    """Seconds per update."""

    mode: str
    processes: int
    calculated: float
    measured: float


def validate(processes: Sequence[int]) -> list[Point]:
    """Data parallelism and model parallelism by filters of a ResNet-20 on the digits.

    Calculated from what the updates and layers of single processes take while as many of them compute side by side,
    and from the times of their all-reduces. A share of the filters is taken to cost what that share of the samples
    does.
    """
    composer = Composer()
    folder = Path(tempfile.mkdtemp(prefix="dlopt-bench-"))
    points = []
    try:
        for count in (each for each in processes if each > 1):
            batch = BATCH // count
            found = company.measured(_config(composer, "single", batch), folder / f"company-{count}", count)
            cluster = _cluster(count, found)
            whole = [
                replace(each, forward=each.forward * count, backward=each.backward * count) for each in found.layers
            ]
            calculated = {
                "ddp": simulation.ddp(found.layers, batch, count, cluster),
                "filter": simulation.filter_parallel(whole, batch, count, cluster, count),
            }
            for mode, each in calculated.items():
                config = _config(composer, mode, BATCH)
                steps = modes.steps_of(config, folder / f"{mode}-{count}", mode, count, _PLAN)
                points.append(Point(mode, count, each.step, statistics.median(steps)))
        return points
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config(composer: Composer, mode: str, batch: int) -> dict[str, Any]:
    overrides = [*_COMMON, f"parallel={mode}", f"data.batch_size={batch}"]
    return to_plain(composer.compose(overrides), overrides)[1]


def _cluster(processes: int, found: Company) -> Cluster:
    link = found.link
    return Cluster(
        per_server=processes,
        tflops=1.0,  # not asked for: all layers are timed
        memory_bandwidth=1e6,  # the optimizer's time is part of the layers'
        memory=1e6,
        bandwidth_within=link.bandwidth / 1e9,
        latency_within=link.latency * 1e6,
        bandwidth_between=link.bandwidth / 1e9,
        latency_between=link.latency * 1e6,
        variation=found.variation,
        value_bytes=4,
        micro_batches=1,
        bucket_mb=25.0,
    )
