"""Benchmarks parallel modes on this machine: metrics, table and plot; validates the simulation against measurements."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dlopt.basics.scratch import scratch
from dlopt.config.resolve import to_plain
from dlopt.extend import Composer, RunError, UserError
from dlopt.instruments.measuring_ranks import run_ranks
from dlopt.results import drawing
from dlopt.tracking.terminal_text import plain_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dlopt.lab.scaling import simulation
    from dlopt.lab.scaling.contention import SharedTimes

_QUIET = {"KINETO_LOG_LEVEL": "99"}  # Kineto warns on stderr that there is no GPU


@dataclass(frozen=True)
class ModeResult:
    """Metrics of one mode with one number of processes; times in seconds per update, aggregated over ranks."""

    label: str
    mode: str
    processes: int
    problem: str | None = None  # why the benchmark failed; the metrics are then NaN
    threads: int = 1  # of each process
    step: float = math.nan  # the slowest rank's median
    samples_per_second: float = math.nan
    speedup: float = math.nan  # against one process
    efficiency: float = math.nan  # speed-up per process
    peak_mb: tuple[float, ...] = ()  # of each rank, above the memory of the process before the build
    sent_mb: float = math.nan  # by the rank that sends the most
    collectives: float = math.nan
    communicating: float = math.nan  # fraction of the time with a collective in flight
    waiting: float = math.nan  # fraction with a collective in flight and no computation
    own: tuple[float, ...] = ()  # seconds of each rank without waiting

    @property
    def spread(self) -> float:
        """Difference between the slowest and the fastest rank without waiting, as a fraction of the slowest."""
        if not self.own:
            return math.nan
        return (max(self.own) - min(self.own)) / max(self.own)


def measure(
    config: Mapping[str, Any], folder: Path, *, label: str, mode: str, processes: int, settings: Mapping[str, Any]
) -> ModeResult:
    """Benchmarks one mode; on failure the result has a `problem` instead of metrics."""
    ranks, problem = _run(config, folder, processes, settings)
    if problem is not None:
        return ModeResult(label, mode, processes, problem)
    return summarize(label, mode, ranks)


def _run(
    config: Mapping[str, Any], folder: Path, processes: int, settings: Mapping[str, Any]
) -> tuple[list[Any], str | None]:
    """Starts `dlopt.lab.scaling.rank` processes; returns the metrics of each rank, and the error of a failed one."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(dict(settings)))
    environment = dict(_QUIET)
    if settings["memory_limit_mb"] is not None:
        # The limit counts address space: by default, each thread's malloc arena reserves 64 MiB that it does not use.
        environment["MALLOC_ARENA_MAX"] = "1"
    codes = run_ranks("dlopt.lab.scaling.rank", folder, config, processes, environment)
    ranks = []
    for rank in range(processes):
        path = folder / f"rank-{rank}.json"
        ranks.append(json.loads(path.read_text()) if path.exists() else None)
    return ranks, _problem(ranks, codes)


def _problem(ranks: Sequence[Mapping[str, Any] | None], codes: Sequence[int]) -> str | None:
    """Returns the error of a rank, the cause if several ranks have one; None if all succeeded."""
    messages = []
    for key in ("refused", "failed"):
        for rank in ranks:
            if rank is not None and key in rank:
                messages.append(str(rank[key]))
    causes = [message for message in messages if message != "another process failed"]
    if causes:
        return causes[0]
    if messages:
        return messages[0]
    for number, rank in enumerate(ranks):
        if rank is None:
            return f"rank {number} failed with exit code {codes[number]}"
    return None


def summarize(label: str, mode: str, ranks: Sequence[Any]) -> ModeResult:
    """Aggregates the metrics of the ranks: the slowest step, the mean of fractions, the largest of counts."""
    count = len(ranks)
    medians = [statistics.median(rank["steps"]) for rank in ranks]
    step = max(medians)
    own = [median * (1 - rank["waiting"]) for median, rank in zip(medians, ranks, strict=True)]
    return ModeResult(
        label=label,
        mode=mode,
        processes=count,
        threads=ranks[0]["threads"],
        step=step,
        samples_per_second=ranks[0]["samples"] / step,
        peak_mb=tuple(rank["peak_mb"] for rank in ranks),
        sent_mb=max(rank["sent_mb"] for rank in ranks),
        collectives=max(rank["collectives"] for rank in ranks),
        communicating=sum(rank["communicating"] for rank in ranks) / count,
        waiting=sum(rank["waiting"] for rank in ranks) / count,
        own=tuple(own),
    )


def with_speedup(row: ModeResult, single: ModeResult) -> ModeResult:
    """Adds the speed-up and efficiency over one process to `row`."""
    speedup = row.samples_per_second / single.samples_per_second
    return replace(row, speedup=speedup, efficiency=speedup / row.processes)


def table(rows: Sequence[ModeResult]) -> Table:
    """Formats the results as a console table."""
    shown = plain_table(left=["mode"], right=["processes", *_COLUMNS])
    for row in rows:
        cells = ["-"] * len(_COLUMNS)
        if row.problem is None:
            cells = [cell(row) for cell in _COLUMNS.values()]
        shown.add_row(row.label, str(row.processes), *cells)
    return shown


def _speedup(row: ModeResult) -> str:
    return "-" if math.isnan(row.speedup) else f"{row.speedup:.2f}"


def _efficiency(row: ModeResult) -> str:
    return "-" if math.isnan(row.efficiency) else f"{row.efficiency:.0%}"


def _peaks(row: ModeResult) -> str:
    """Formats the peak memory of up to four ranks, or the largest one of more."""
    peaks = row.peak_mb
    if len(peaks) > 4:
        peaks = (max(peaks),)
    return "/".join(f"{peak:.0f}" for peak in peaks)


def _busy(row: ModeResult) -> str:
    fastest, slowest = min(row.own), max(row.own)
    return f"{fastest * 1e3:.1f}-{slowest * 1e3:.1f}"


_COLUMNS: Mapping[str, Callable[[ModeResult], str]] = {
    "threads": lambda row: str(row.threads),
    "ms/step": lambda row: f"{row.step * 1e3:.1f}",
    "samples/s": lambda row: f"{row.samples_per_second:.0f}",
    "speed-up": _speedup,
    "efficiency": _efficiency,
    "peak MiB/rank": _peaks,
    "sent MiB/step": lambda row: f"{row.sent_mb:.3g}",
    "collectives": lambda row: f"{row.collectives:g}",
    "communicating": lambda row: f"{row.communicating:.0%}",
    "waiting": lambda row: f"{row.waiting:.0%}",
    "busy ms, fastest-slowest": _busy,
    "spread": lambda row: f"{row.spread:.0%}",
}


def failures(rows: Sequence[ModeResult]) -> list[str]:
    """Returns one line per failed benchmark."""
    return [f"{row.label} on {row.processes}: {row.problem}" for row in rows if row.problem is not None]


def draw(rows: Sequence[ModeResult], *, title: str) -> "Figure":
    """Plots six metrics as bar charts, one bar per result."""
    figure = drawing.figure(13, 2.2 + 0.62 * len(rows), title)
    panels = figure.subplots(2, 3, sharey=True).ravel()
    steps, throughput, efficiency, memory, sent, communication = panels

    _bars(steps, rows, [row.step * 1e3 for row in rows], ".1f", "ms per update (marks: each rank without waiting)")
    _bars(throughput, rows, [row.samples_per_second for row in rows], ".0f", "samples per second")
    _bars(efficiency, rows, [100 * row.efficiency for row in rows], ".0f", "speed-up per process, in %")
    peaks = [max(row.peak_mb, default=math.nan) for row in rows]
    _bars(memory, rows, peaks, ".0f", "peak memory per rank in MiB")
    _bars(sent, rows, [row.sent_mb for row in rows], ".3g", "MiB sent per rank and update")
    communicating = [100 * row.communicating for row in rows]
    _bars(communication, rows, communicating, ".0f", "time in communication, in % (dark: waiting)")
    drawing.clean_axes(*panels, axis="x")

    for i, row in enumerate(rows):
        if row.processes > 1:
            busy = [seconds * 1e3 for seconds in row.own]
            steps.plot(busy, [i] * len(busy), "|", color="black", markersize=13, markeredgewidth=1.5)
    efficiency.axvline(100, color="0.4", linewidth=1, linestyle=":")
    efficiency.set_xlim(right=max(efficiency.get_xlim()[1], 118))
    waiting = [_length(100 * row.waiting) for row in rows]
    communication.barh(_names(rows), waiting, color="0.2", height=0.35)
    communication.set_xlim(0, 115)
    steps.invert_yaxis()
    return figure


def _bars(axes: "Axes", rows: Sequence[ModeResult], values: Sequence[float], form: str, label: str) -> None:
    """Plots one metric, a bar with its value for each result; NaN: why there is none."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    colours = [drawing.COLOURS[modes.index(row.mode) % len(drawing.COLOURS)] for row in rows]
    lengths = [_length(value) for value in values]
    axes.barh(_names(rows), lengths, color=colours, height=0.7)
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        if not math.isnan(value):
            text = f"{value:{form}}"
        elif row.problem is not None and row.problem.startswith("out of memory"):
            text = "out of memory"
        else:
            text = "failed"
        axes.text(lengths[i], i, f" {text}", va="center", fontsize=8)
    longest = max(lengths)
    axes.set(xlim=(0, 1.22 * longest if longest else 1), xlabel=label)


def _names(rows: Sequence[ModeResult]) -> list[str]:
    return [f"{row.label} × {row.processes}" for row in rows]


def _length(value: float) -> float:
    """Returns the length of a bar: 0 for NaN."""
    return 0.0 if math.isnan(value) else value


def refuse_if_all_failed(rows: Sequence[ModeResult]) -> None:
    """Raises `UserError` with the first error if every benchmark failed."""
    if all(row.problem is not None for row in rows):
        raise UserError(str(rows[0].problem))


# -- validation of the simulation

BATCH = 64
_COMMON = ["model=resnet20", "device=cpu", "threads=1", "data.workers=0"]
_SETTINGS = {"updates": 60, "warmup": 3, "profiled": 2, "memory_limit_mb": None}


@dataclass(frozen=True)
class StepTime:
    """Seconds per update: simulated and measured."""

    mode: str
    processes: int
    calculated: float
    measured: float


def validate(processes: Sequence[int]) -> list[StepTime]:
    """Compares simulated and measured updates of a ResNet-20 on digits, with data and with tensor parallelism.

    The simulation gets the times of updates, layers and all-reduces of single processes under the same load. It assumes
    that 1/p of the filters cost as much as 1/p of the samples.
    """
    from dlopt.lab.scaling import contention, simulation

    composer = Composer()
    results = []
    with scratch() as folder:
        for count in processes:
            if count < 2:
                continue  # nothing to simulate
            batch = BATCH // count
            load = contention.measure(_config(composer, "single", batch), folder / f"contention-{count}", count)
            cluster = _cluster(load, count)
            simulated = {
                "ddp": simulation.ddp(load.layers, batch, count, cluster),
                "filter": simulation.filter_parallel(load.layers, batch, count, cluster, count),
            }
            for mode, cost in simulated.items():
                measured = _measured_step(composer, mode, count, folder / f"{mode}-{count}")
                results.append(StepTime(mode, count, cost.step, measured))
    return results


def _cluster(load: "SharedTimes", processes: int) -> "simulation.Cluster":
    """Returns this machine as a cluster: one server with a process per device."""
    from dlopt.lab.scaling.simulation import Cluster

    latency = load.link.latency * 1e6
    bandwidth = load.link.bandwidth / 1e9
    return Cluster(
        per_server=processes,
        tflops=1.0,  # not used: all layers are timed
        memory_bandwidth=1e6,  # the optimizer's time is part of the layers'
        memory=1e6,
        latency_within=latency,
        latency_between=latency,
        bandwidth_within=bandwidth,
        bandwidth_between=bandwidth,
        variation=load.variation,
        value_bytes=4,
        micro_batches=1,
        bucket_mb=25.0,
    )


def _measured_step(composer: Composer, mode: str, processes: int, folder: Path) -> float:
    """Returns the median over the updates of the slowest rank's seconds."""
    ranks, problem = _run(_config(composer, mode, BATCH), folder, processes, _SETTINGS)
    if problem is not None:
        raise RunError(f"parallel={mode} on {processes} processes: {problem}")
    slowest = [max(seconds) for seconds in zip(*(rank["steps"] for rank in ranks), strict=True)]
    return statistics.median(slowest)


def _config(composer: Composer, mode: str, batch: int) -> dict[str, Any]:
    return to_plain(composer.compose([*_COMMON, f"parallel={mode}", f"data.batch_size={batch}"]))[1]
