"""What a benchmark of parallel modes says: one row per mode and number of processes, and the picture of all rows."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dlopt.analysis.drawing import COLOURS
from dlopt.errors import RunError, UserError
from dlopt.parallel.launch import run_processes
from dlopt.tracking.layout import Fitted, plain_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUIET = {"KINETO_LOG_LEVEL": "99"}  # the profiler's library tells on stderr that there is no GPU
_HATCHES = ("", "///")


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
    ranks, codes = _run(config, folder, processes, plan)
    problem = _problem(ranks, codes)
    return Row(label, mode, processes, problem) if problem is not None else _row(label, mode, ranks)


def steps_of(
    config: Mapping[str, Any], folder: Path, mode: str, processes: int, plan: Mapping[str, Any]
) -> list[float]:
    """Seconds of each update, by the slowest rank. Raises `RunError`."""
    ranks, codes = _run(config, folder, processes, plan)
    problem = _problem(ranks, codes)
    if problem is not None:
        raise RunError(f"parallel={mode} on {processes} processes: {problem}")
    return [max(steps) for steps in zip(*(each["steps"] for each in ranks if each is not None), strict=True)]


def _run(
    config: Mapping[str, Any], folder: Path, processes: int, plan: Mapping[str, Any]
) -> tuple[list[Any], list[int]]:
    """What each rank of `dlopt.analysis.bench.rank` left (None: nothing), and its exit code."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    (folder / "plan.json").write_text(json.dumps(dict(plan)))
    command = [sys.executable, "-m", "dlopt.analysis.bench.rank", str(folder)]
    # A limit is one of addresses: without this every thread has 64 MiB of its own that it does not use.
    environment = _QUIET | ({} if plan["memory_limit_mb"] is None else {"MALLOC_ARENA_MAX": "1"})
    if processes == 1:
        codes = [subprocess.run(command, env={**os.environ, **environment}).returncode]
    else:
        codes, _, asked = run_processes(command, processes, environment)
        if asked:
            raise KeyboardInterrupt
    files = [folder / f"rank-{rank}.json" for rank in range(processes)]
    return [json.loads(path.read_text()) if path.exists() else None for path in files], codes


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


COLUMNS = (
    "mode", "processes", "threads", "ms/step", "samples/s", "speed-up", "efficiency", "peak MiB/rank", "sent MiB/step",
    "collectives", "communicating", "waiting", "own ms, fastest-slowest", "spread",
)  # fmt: skip


def table(rows: Sequence[Row]) -> Fitted:
    """A row of figures for each."""
    shown = plain_table()
    for i, name in enumerate(COLUMNS):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        figures = _cells(row) if row.problem is None else ["-"] * (len(COLUMNS) - 2)
        shown.add_row(row.label, str(row.processes), *figures)
    return Fitted(shown)


def problems(rows: Sequence[Row]) -> list[str]:
    """Why rows have no figures."""
    return [f"{row.label} on {row.processes}: {row.problem}" for row in rows if row.problem is not None]


def _cells(row: Row) -> list[str]:
    peak = "/".join(f"{each:.0f}" for each in row.peak_mb) if len(row.peak_mb) <= 4 else f"{max(row.peak_mb):.0f}"
    return [
        str(row.threads),
        f"{row.step * 1e3:.1f}",
        f"{row.samples_per_second:.0f}",
        "-" if math.isnan(row.speedup) else f"{row.speedup:.2f}",
        "-" if math.isnan(row.efficiency) else f"{row.efficiency:.0%}",
        peak,
        f"{row.sent_mb:.3g}",
        f"{row.collectives:g}",
        f"{row.communicating:.0%}",
        f"{row.waiting:.0%}",
        f"{min(row.own) * 1e3:.1f}-{max(row.own) * 1e3:.1f}",
        f"{row.spread:.0%}",
    ]


def draw(rows: Sequence[Row], *, title: str) -> "Figure":
    """A bar per row in each of six panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2.2 + 0.62 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(2, 3, sharey=True)
    names = [f"{row.label} × {row.processes}" for row in rows]
    modes = list(dict.fromkeys(row.mode for row in rows))
    colours = [COLOURS[modes.index(row.mode) % len(COLOURS)] for row in rows]

    def bars(axes: "Axes", label: str, values: Sequence[float], form: str) -> None:
        kept = [0.0 if math.isnan(value) else value for value in values]
        axes.barh(names, kept, color=colours, height=0.7)
        for i, value in enumerate(values):
            text = _short(rows[i].problem) if math.isnan(value) else form.format(value)
            axes.text(kept[i], i, f" {text}", va="center", fontsize=8)
        axes.set_xlim(0, max(kept) * 1.22 or 1)
        axes.set_xlabel(label)

    (first, second, third), (fourth, fifth, sixth) = panels
    bars(first, "ms per update (marks: a rank's own work)", [row.step * 1e3 for row in rows], "{:.1f}")
    for i, row in enumerate(rows):
        if row.processes > 1:
            own = [each * 1e3 for each in row.own]
            first.plot(own, [i] * len(own), "|", color="black", markersize=13, markeredgewidth=1.5)
    bars(second, "samples per second", [row.samples_per_second for row in rows], "{:.0f}")
    bars(third, "speed-up per process, in %", [100 * row.efficiency for row in rows], "{:.0f}")
    third.axvline(100, color="0.4", linewidth=1, linestyle=":")
    third.set_xlim(right=max(third.get_xlim()[1], 118))
    bars(fourth, "peak memory of a rank in MiB", [max(row.peak_mb, default=math.nan) for row in rows], "{:.0f}")
    bars(fifth, "MiB sent per rank and update", [row.sent_mb for row in rows], "{:.3g}")
    bars(sixth, "time in communication, in % (dark: waiting)", _percent(rows), "{:.0f}")
    sixth.barh(names, [0 if math.isnan(row.waiting) else 100 * row.waiting for row in rows], color="0.2", height=0.35)
    sixth.set_xlim(0, 115)
    first.invert_yaxis()
    for axes in panels.flat:
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _percent(rows: Sequence[Row]) -> list[float]:
    return [100 * row.communicating for row in rows]


def _short(problem: str | None) -> str:
    text = problem or "none"
    return "out of memory" if text.startswith("out of memory") else "no figures"


def refuse_if_all_failed(rows: Sequence[Row]) -> None:
    """Raises `UserError` with the first row's reason when no row has figures."""
    if all(row.problem is not None for row in rows):
        raise UserError(str(rows[0].problem))
