"""Comparison of a few small runs: expands it into runs and reads their metrics."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from dlopt.basics.formats import format_percent
from dlopt.extend import NotEmpty, Seed, show
from dlopt.lab.comparison.claims import Claim, Value, is_higher_better
from dlopt.lab.comparison.intervals import Average, average
from dlopt.lab.comparison.labels import is_percent, label
from dlopt.lab.comparison.probes import PROBES
from dlopt.metrics.measures import MEASURES, derived
from dlopt.metrics.names import Directions, split_of
from dlopt.tracking.metrics import read_metrics, read_summary
from dlopt.tracking.terminal_text import align_columns


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison in an experiment file; conf/experiment/lecture/_comparison.yaml explains the keys."""

    title: str
    see: str
    variants: Annotated[dict[str, list[str]], MinLen(1)]
    along: dict[str, list[Value] | dict[str, list[str]]]
    seeds: NotEmpty[Seed]
    metrics: NotEmpty[str]
    x: Literal[
        "epoch", "step", "evaluation", "seconds", "step_and_seconds", "epoch_and_step_and_seconds",
        "step_and_evaluation_and_seconds",
    ]  # fmt: skip
    choose: str | None
    only: list[str]
    quick: bool
    quick_overrides: list[str]
    tuned: bool = False
    claims: list[Claim]
    before: dict[str, list[str]] = field(default_factory=dict)
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    directions: Directions = field(default_factory=dict)  # of the user's metrics

    def is_higher_better(self, metric: str) -> bool:
        return is_higher_better(metric, self.directions)

    def average(self, metric: str, values: Sequence[float]) -> Average:
        """Averages over seeds as the claims about the metric do: on a logarithmic scale if a margin is a factor."""
        claims = [each for each in self.claims if each.metric == metric and each.measure == "value"]
        return average(values, is_ratio=any(each.factor is not None for each in claims))

    @property
    def all_metrics(self) -> list[str]:
        """The plotted metrics, and additional metrics for claims and the choice of the best point."""
        chosen = [] if self.choose is None else [self.choose]
        return [*dict.fromkeys([*self.metrics, *(claim.metric for claim in self.claims), *chosen])]

    @property
    def axes(self) -> list[str]:
        """The x-axes of curves, one panel each."""
        return self.x.split("_and_")

    def cells(self) -> Iterator["VariantRun"]:
        """Yields all runs: first the runs that variants start from, then variant by variant."""
        for name, seed in product(self.before, self.seeds):
            yield VariantRun(name, (), seed)
        for variant, point, seed in product(self.variants, product(*self.along.values()), self.seeds):
            yield VariantRun(variant, point, seed)

    def overrides(self, cell: "VariantRun") -> list[str]:
        """Returns the overrides of one run. A variant may override the keys of `along`, because it comes after them."""
        if cell.variant in self.before:
            return [*self.before[cell.variant], f"seed={cell.seed}"]
        lines: list[str] = []
        for (key, values), value in zip(self.along.items(), cell.point, strict=True):
            lines += values[str(value)] if isinstance(values, dict) else [f"{key}={show(value)}"]
        return [*lines, *self.variants[cell.variant], f"seed={cell.seed}"]


@dataclass(frozen=True)
class VariantRun:
    """One run: a variant, a value of each key of `along`, and a seed. A run of `before` has no such values."""

    variant: str
    point: tuple[Value, ...]
    seed: int


def matches(value: Value, other: Value) -> bool:
    """Returns whether two values of an axis are the same: 1 and 1.0, and 8 and "8", are."""
    return value == other or show(value) == show(other)


def are_numbers(values: Sequence[Any]) -> bool:
    """Returns whether all values are numbers, or strings of numbers (names of points that set several keys)."""
    try:
        return not any(isinstance(value, bool) for value in values) and bool([float(value) for value in values])
    except (TypeError, ValueError):
        return False


@dataclass(frozen=True)
class VariantOutcome:
    """Results of a run: the lines of metrics.jsonl, the summary, and probes of its checkpoints."""

    history: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    probes: Mapping[str, Sequence[tuple[Mapping[str, Any], float]]]  # probe -> (progress, value) of each checkpoint

    @property
    def failed(self) -> bool:
        return self.summary.get("status") == "failed"

    @property
    def metrics(self) -> list[str]:
        """The metrics of the evaluated epochs, also non-finite ones."""
        return [*dict.fromkeys(name for line in self.history for name in line)]

    def may_have(self, name: str) -> bool:
        """Returns whether the run has the metric. True for a run that failed, maybe before it had any."""
        needs = MEASURES[name].needs if name in MEASURES else ()
        validated = {each for each in needs if split_of(each) == "val"}  # of gaps
        names = {name, *(validated or {name.replace("_error", "_accuracy")})}
        tested = {key for key, value in self.summary.items() if value is not None}
        return self.failed or not self.history or bool(names & {*self.metrics, *self.probes, *tested})

    def curve(self, name: str, x: str) -> tuple[list[float], list[float]]:
        """Returns (x, values) of all epochs, or of all checkpoints for a probe."""
        if name in self.probes:
            lines = {line["step"]: line for line in self.history}  # a checkpoint counts no evaluations
            pairs = [(on_axis(lines.get(at["step"], at), x), value) for at, value in self.probes[name]]
        else:
            pairs = [(on_axis(line, x), value) for line in self.history if (value := _value_in(line, name)) is not None]
        return [float(position) for position, _ in pairs], [float(value) for _, value in pairs]

    def final(self, name: str) -> float:
        """Returns the final value of the metric; NaN for a failed run, which counts as diverged."""
        if self.failed:
            return math.nan
        if self.summary.get(name) is not None:  # of the test
            return float(self.summary[name])
        values = self.curve(name, "step")[1]
        return values[-1] if values else math.nan


def on_axis(line: Mapping[str, Any], x: str) -> float:
    """Returns the position of a line of metrics.jsonl on an x-axis.

    `evaluation`: evaluations of the loss, in passes over the training set, so that small and large batches compare.
    Optimizers that evaluate the loss once per update make one pass per epoch. Hessian-vector products do not count.
    """
    if x != "evaluation":
        return float(line[x])
    return float(line["epoch"] * line.get("evaluations", line["step"]) / max(line["step"], 1))


def _value_in(line: Mapping[str, Any], name: str) -> Any:
    """Returns the metric in a line of metrics.jsonl; `val_error` is 1 - `val_accuracy`."""
    if name in line or not name.endswith("_error"):
        return line[name] if name in line else derived(line).get(name)
    accuracy = line.get(name.replace("_error", "_accuracy"))
    return None if accuracy is None else 1 - accuracy


def read(folder: Path, metrics: Sequence[str]) -> VariantOutcome:
    """Reads the results of the run in `folder`; computes the probes among `metrics` from its checkpoints."""
    return VariantOutcome(
        history=read_metrics(folder),
        summary=read_summary(folder) or {"status": "failed"},
        probes={name: PROBES[name](folder) for name in metrics if name in PROBES},
    )


@dataclass(frozen=True)
class Results:
    """A comparison and the outcomes of its runs."""

    comparison: Comparison
    outcomes: Mapping[VariantRun, VariantOutcome]

    def over_seeds(self, variant: str, point: tuple[Value, ...]) -> list[VariantOutcome]:
        return [self.outcomes[VariantRun(variant, point, seed)] for seed in self.comparison.seeds]

    def finals(self, variant: str, name: str) -> dict[Any, list[float]]:
        """Returns point of the axes -> final values of the metric, one per seed.

        Their average is NaN if one of them is: a setting that diverges for one seed is not usable.
        """
        points = product(*self.comparison.along.values())
        return {point: [run.final(name) for run in self.over_seeds(variant, point)] for point in points}

    def tuned(self) -> "Results":
        """Returns the results without axes: each variant at its best point, named in its label.

        Best: the mean over seeds of `choose`, or of the first metric, without points at which a seed diverged.
        """
        metric = self.comparison.choose or self.comparison.metrics[0]
        sign = -1 if self.comparison.is_higher_better(metric) else 1
        variants, outcomes = {}, {}
        for variant, overrides in self.comparison.variants.items():
            means = {point: sign * fmean(values) for point, values in self.finals(variant, metric).items()}
            best = min(means, key=lambda point: math.inf if math.isnan(means[point]) else means[point])
            at = ", ".join(
                f"{label(key)} {show(value)}" for key, value in zip(self.comparison.along, best, strict=True)
            )
            variants[f"{variant} ({at})"] = overrides
            for seed, run in zip(self.comparison.seeds, self.over_seeds(variant, best), strict=True):
                outcomes[VariantRun(f"{variant} ({at})", (), seed)] = run
        return Results(replace(self.comparison, along={}, variants=variants), outcomes)

    def table(self) -> list[str]:
        """Formats a table: a line per variant and point of the axes, with final metrics averaged over seeds."""
        metrics, average = self.comparison.metrics, self.comparison.average
        rows = [["variant", *self.comparison.along, *metrics]]
        for variant in self.comparison.variants:
            columns = [self.finals(variant, name) for name in metrics]
            for point in columns[0]:
                finals = [average(name, column[point]).middle for name, column in zip(metrics, columns, strict=True)]
                rows.append([variant, *map(show, point), *map(format_final, metrics, finals)])
        return align_columns(rows)


def format_final(metric: str, value: float) -> str:
    if math.isnan(value):
        return "diverged"
    return format_percent(value) if is_percent(metric) else f"{value:.4g}"
