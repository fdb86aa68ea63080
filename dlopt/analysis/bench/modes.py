"""Benchmarks of parallel modes: a row per mode and number of processes, their picture, and a check of the simulation.

The check sets calculated times per update against measured ones, with a few processes on this machine.
"""

import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dlopt.analysis import drawing
from dlopt.config.compose import Composer, to_plain
from dlopt.errors import RunError, UserError
from dlopt.parallel.launch import python_module, run_processes
from dlopt.tracking.layout import Fitted, plain_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUIET = {"KINETO_LOG_LEVEL": "99"}  # the profiler's library tells on stderr that there is no GPU


@dataclass(frozen=True)
class Row:
    """One mode with one number of processes; times in seconds per update. Means and extremes are over ranks."""

    label: str
    mode: str
    processes: int
    problem: str | None = None  # why there are no figures
    threads: int = 1  # of each process
    step: float = math.nan  # the slowest rank's median
    samples_per_second: float = math.nan
    speedup: float = math.nan  # against one process
    efficiency: float = math.nan  # speed-up per process
    peak_mb: tuple[float, ...] = ()  # of each rank, beyond the bare process
    sent_mb: float = math.nan  # by the rank that sends the most
    collectives: float = math.nan
    communicating: float = math.nan  # share of the time with a collective under way
    waiting: float = math.nan  # share with nothing else going on
    own: tuple[float, ...] = ()  # seconds in which each rank works by itself

    @property
    def spread(self) -> float:
        """How much longer the slowest rank works than the fastest, as a share of the slowest's time."""
        return (max(self.own) - min(self.own)) / max(self.own) if self.own else math.nan


def measure(
    config: Mapping[str, Any], folder: Path, *, label: str, mode: str, processes: int, plan: Mapping[str, Any]
) -> Row:
    """The row of one measurement, with the reason instead of figures where it failed."""
    ranks, problem = _run(config, folder, processes, plan)
    return Row(label, mode, processes, problem) if problem is not None else _row(label, mode, ranks)


def steps_of(
    config: Mapping[str, Any], folder: Path, mode: str, processes: int, plan: Mapping[str, Any]
) -> list[float]:
    """Seconds of each update, by the slowest rank. Raises `RunError`."""
    ranks, problem = _run(config, folder, processes, plan)
    if problem is not None:
        raise RunError(f"parallel={mode} on {processes} processes: {problem}")
    return [max(steps) for steps in zip(*(each["steps"] for each in ranks), strict=True)]


def _run(
    config: Mapping[str, Any], folder: Path, processes: int, plan: Mapping[str, Any]
) -> tuple[list[Any], str | None]:
    """What each rank of `dlopt.analysis.bench.rank` measured, and why one did not."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    (folder / "plan.json").write_text(json.dumps(dict(plan)))
    command = python_module("dlopt.analysis.bench.rank", str(folder))
    # A limit is one of addresses: without this every thread has 64 MiB of its own that it does not use.
    environment = _QUIET | ({} if plan["memory_limit_mb"] is None else {"MALLOC_ARENA_MAX": "1"})
    if processes == 1:
        codes = [subprocess.run(command, env={**os.environ, **environment}).returncode]
    else:
        codes, _, asked = run_processes(command, processes, environment)
        if asked:
            raise KeyboardInterrupt
    files = [folder / f"rank-{rank}.json" for rank in range(processes)]
    ranks = [json.loads(path.read_text()) if path.exists() else None for path in files]
    return ranks, _problem(ranks, codes)


def _problem(ranks: Sequence[Mapping[str, Any] | None], codes: Sequence[int]) -> str | None:
    told = [str(each[key]) for key in ("refused", "failed") for each in ranks if each is not None and key in each]
    told.sort(key=lambda text: text == "another process ended")  # which it is for the others to explain
    if told:
        return told[0]
    gone = next((rank for rank, each in enumerate(ranks) if each is None), None)
    return None if gone is None else f"rank {gone} ended with {codes[gone]}"


def _row(label: str, mode: str, ranks: Sequence[Any]) -> Row:
    medians = [sorted(each["steps"])[len(each["steps"]) // 2] for each in ranks]
    step = max(medians)
    count = len(ranks)
    return Row(
        label=label,
        mode=mode,
        processes=count,
        threads=ranks[0]["threads"],
        step=step,
        samples_per_second=ranks[0]["samples"] / step,
        peak_mb=tuple(each["peak_mb"] for each in ranks),
        sent_mb=max(each["sent_mb"] for each in ranks),
        collectives=max(each["collectives"] for each in ranks),
        communicating=sum(each["communicating"] for each in ranks) / count,
        waiting=sum(each["waiting"] for each in ranks) / count,
        own=tuple(median * (1 - each["waiting"]) for median, each in zip(medians, ranks, strict=True)),
    )


def against(row: Row, single: Row) -> Row:
    """`row` with its speed-up and efficiency against one process."""
    speedup = row.samples_per_second / single.samples_per_second
    return replace(row, speedup=speedup, efficiency=speedup / row.processes)


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "threads": lambda row: str(row.threads),
    "ms/step": lambda row: f"{row.step * 1e3:.1f}",
    "samples/s": lambda row: f"{row.samples_per_second:.0f}",
    "speed-up": lambda row: "-" if math.isnan(row.speedup) else f"{row.speedup:.2f}",
    "efficiency": lambda row: "-" if math.isnan(row.efficiency) else f"{row.efficiency:.0%}",
    "peak MiB/rank": lambda row: "/".join(
        f"{each:.0f}" for each in (row.peak_mb if len(row.peak_mb) <= 4 else [max(row.peak_mb)])
    ),
    "sent MiB/step": lambda row: f"{row.sent_mb:.3g}",
    "collectives": lambda row: f"{row.collectives:g}",
    "communicating": lambda row: f"{row.communicating:.0%}",
    "waiting": lambda row: f"{row.waiting:.0%}",
    "own ms, fastest-slowest": lambda row: f"{min(row.own) * 1e3:.1f}-{max(row.own) * 1e3:.1f}",
    "spread": lambda row: f"{row.spread:.0%}",
}


def table(rows: Sequence[Row]) -> Fitted:
    """A line for each row."""
    shown = plain_table()
    shown.add_column("mode")
    for name in ("processes", *_COLUMNS):
        shown.add_column(name, justify="right")
    for row in rows:
        cells = ["-" if row.problem is not None else cell(row) for cell in _COLUMNS.values()]
        shown.add_row(row.label, str(row.processes), *cells)
    return Fitted(shown)


def problems(rows: Sequence[Row]) -> list[str]:
    """Why rows have no figures."""
    return [f"{row.label} on {row.processes}: {row.problem}" for row in rows if row.problem is not None]


def draw(rows: Sequence[Row], *, title: str) -> "Figure":
    """A bar per row in each of six panels."""
    figure = drawing.figure(13, 2.2 + 0.62 * len(rows), title)
    panels = figure.subplots(2, 3, sharey=True).ravel()
    names = [f"{row.label} × {row.processes}" for row in rows]
    modes = list(dict.fromkeys(row.mode for row in rows))
    colours = [drawing.COLOURS[modes.index(row.mode) % len(drawing.COLOURS)] for row in rows]
    shown: list[tuple[str, str, list[float]]] = [
        ("ms per update (marks: a rank's own work)", ".1f", [row.step * 1e3 for row in rows]),
        ("samples per second", ".0f", [row.samples_per_second for row in rows]),
        ("speed-up per process, in %", ".0f", [100 * row.efficiency for row in rows]),
        ("peak memory of a rank in MiB", ".0f", [max(row.peak_mb, default=math.nan) for row in rows]),
        ("MiB sent per rank and update", ".3g", [row.sent_mb for row in rows]),
        ("time in communication, in % (dark: waiting)", ".0f", [100 * row.communicating for row in rows]),
    ]
    for axes, (label, form, values) in zip(panels, shown, strict=True):
        lengths = [0.0 if math.isnan(value) else value for value in values]
        axes.barh(names, lengths, color=colours, height=0.7)
        for i, value in enumerate(values):
            text = _short(rows[i].problem) if math.isnan(value) else f"{value:{form}}"
            axes.text(lengths[i], i, f" {text}", va="center", fontsize=8)
        axes.set_xlim(0, max(lengths) * 1.22 or 1)
        axes.set_xlabel(label)
    drawing.plain(*panels, axis="x")
    steps, _, speedups, _, _, communication = panels
    for i, row in enumerate(rows):
        if row.processes > 1:
            own = [each * 1e3 for each in row.own]
            steps.plot(own, [i] * len(own), "|", color="black", markersize=13, markeredgewidth=1.5)
    speedups.axvline(100, color="0.4", linewidth=1, linestyle=":")
    speedups.set_xlim(right=max(speedups.get_xlim()[1], 118))
    waiting = [0 if math.isnan(row.waiting) else 100 * row.waiting for row in rows]
    communication.barh(names, waiting, color="0.2", height=0.35)
    communication.set_xlim(0, 115)
    steps.invert_yaxis()
    return figure


def _short(problem: str | None) -> str:
    return "out of memory" if problem is not None and problem.startswith("out of memory") else "no figures"


def refuse_if_all_failed(rows: Sequence[Row]) -> None:
    """Raises `UserError` with the first row's reason when no row has figures."""
    if all(row.problem is not None for row in rows):
        raise UserError(str(rows[0].problem))


# -- the simulation against measured updates

BATCH = 64
_COMMON = ["model=resnet20", "device=cpu", "threads=1", "data.workers=0"]
_PLAN = {"updates": 60, "warmup": 3, "profiled": 2, "memory_limit_mb": None}


@dataclass(frozen=True)
class Point:
    """Seconds per update, calculated and measured."""

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
    from dlopt.analysis.bench import contention, simulation

    composer = Composer()
    points = []
    with tempfile.TemporaryDirectory(prefix="dlopt-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for count in (each for each in processes if each > 1):
            batch = BATCH // count
            found = contention.measured(_config(composer, "single", batch), folder / f"contention-{count}", count)
            link = {"latency": found.link.latency * 1e6, "bandwidth": found.link.bandwidth / 1e9}
            cluster = simulation.Cluster(
                per_server=count,
                tflops=1.0,  # not used: all layers are timed
                memory_bandwidth=1e6,  # the optimizer's time is part of the layers'
                memory=1e6,
                **{f"{name}_{place}": value for name, value in link.items() for place in ("within", "between")},
                variation=found.variation,
                value_bytes=4,
                micro_batches=1,
                bucket_mb=25.0,
            )
            whole = [
                replace(each, forward=each.forward * count, backward=each.backward * count) for each in found.layers
            ]
            calculated = {
                "ddp": simulation.ddp(found.layers, batch, count, cluster),
                "filter": simulation.filter_parallel(whole, batch, count, cluster, count),
            }
            for mode, each in calculated.items():
                config = _config(composer, mode, BATCH)
                steps = steps_of(config, folder / f"{mode}-{count}", mode, count, _PLAN)
                points.append(Point(mode, count, each.step, statistics.median(steps)))
    return points


def _config(composer: Composer, mode: str, batch: int) -> dict[str, Any]:
    overrides = [*_COMMON, f"parallel={mode}", f"data.batch_size={batch}"]
    return to_plain(composer.compose(overrides), overrides)[1]
