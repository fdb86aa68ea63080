"""A comparison of a few small runs: which they are, and the figures that they left in their folders."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlopt.analysis.comparison.probes import PROBES
from dlopt.ranges import Seed

Value = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What an experiment file compares; conf/experiment/lecture/_comparison.yaml explains the keys."""

    title: str
    see: str
    variants: dict[str, list[str]]
    along: dict[str, list[Value] | dict[str, list[str]]]
    seeds: list[Seed]
    figures: list[str]
    x: Literal["epoch", "step", "seconds", "step_and_seconds"]

    @property
    def axes(self) -> list[str]:
        """What curves are drawn against, each in a panel of its own."""
        return self.x.split("_and_")

    def cells(self) -> Iterator["Cell"]:
        """Every run, variant by variant."""
        grid: list[tuple[Value, ...]] = [()]
        for values in self.along.values():
            grid = [(*before, value) for before in grid for value in values]
        for variant in self.variants:
            for point in grid:
                for seed in self.seeds:
                    yield Cell(variant, point, seed)

    def overrides(self, cell: "Cell") -> list[str]:
        """What one run changes, as it would be typed. A variant may do without a key of `along`: it comes last."""
        lines: list[str] = []
        for (key, values), value in zip(self.along.items(), cell.point, strict=True):
            lines += values[str(value)] if isinstance(values, dict) else [f"{key}={typed(value)}"]
        return [*lines, *self.variants[cell.variant], f"seed={cell.seed}"]


@dataclass(frozen=True)
class Cell:
    """One run: a variant, a value of each key of `along`, and a seed."""

    variant: str
    point: tuple[Value, ...]
    seed: int


def typed(value: Value) -> str:
    """A value as one types it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: the lines of its metrics.jsonl and its summary."""

    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    probed: Mapping[str, Sequence[tuple[Mapping[str, Any], float]]]  # probe -> (progress, figure) of each checkpoint

    @property
    def failed(self) -> bool:
        return self.summary.get("status") == "failed"

    def curve(self, name: str, x: str) -> tuple[list[float], list[float]]:
        """(x, figure) of every epoch, or of every checkpoint for a probe."""
        if name in self.probed:
            pairs = [(progress[x], value) for progress, value in self.probed[name]]
        else:
            pairs = [(line[x], value) for line in self.metrics if (value := _figure(line, name)) is not None]
        return [float(at) for at, _ in pairs], [float(value) for _, value in pairs]

    def final(self, name: str) -> float:
        """The figure at the end; NaN for a run that failed, which is one that diverged."""
        if self.failed:
            return math.nan
        if self.summary.get(name) is not None:  # of the test
            return float(self.summary[name])
        values = self.curve(name, "step")[1]
        return values[-1] if values else math.nan


def _figure(line: Mapping[str, Any], name: str) -> Any:
    """Of a line of metrics.jsonl; `val_error` is the share that is not right."""
    if not name.endswith("_error"):
        return line.get(name)
    accuracy = line.get(name.replace("_error", "_accuracy"))
    return None if accuracy is None else 1 - accuracy


def read(folder: Path, figures: Sequence[str]) -> Outcome:
    """What the run in `folder` left; the probes among `figures` are computed from its checkpoints."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    summary = folder / "summary.json"
    return Outcome(
        metrics=[json.loads(line) for line in lines],
        summary=json.loads(summary.read_text()) if summary.is_file() else {"status": "failed"},
        probed={name: PROBES[name](folder) for name in figures if name in PROBES},
    )


def mean(values: Sequence[float]) -> float:
    """NaN where one of them is: a setting with which one seed diverges is no setting to take."""
    return sum(values) / len(values)


def finals(comparison: Comparison, outcomes: Mapping[Cell, Outcome], variant: str, name: str) -> dict[Any, list[float]]:
    """The figure at the end for each point of the axes: a value for each seed."""
    found: dict[Any, list[float]] = {}
    for cell in comparison.cells():
        if cell.variant == variant:
            found.setdefault(cell.point, []).append(outcomes[cell].final(name))
    return found


def table(comparison: Comparison, outcomes: Mapping[Cell, Outcome]) -> list[str]:
    """A line for each variant and point of the axes, with the figures at the end, means over the seeds."""
    rows = [["variant", *comparison.along, *comparison.figures]]
    for variant in comparison.variants:
        columns = [finals(comparison, outcomes, variant, name) for name in comparison.figures]
        for point in columns[0]:
            rows.append([variant, *map(typed, point), *(show(mean(column[point])) for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def show(value: float) -> str:
    return "diverged" if math.isnan(value) else f"{value:.4g}"
