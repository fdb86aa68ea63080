"""Formats the numbers of a benchmark for the terminal, the page and papers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dlopt.basics.formats import format_value as text
from dlopt.extend import printable
from dlopt.lab.benchmark.protocol import SELF_TUNING_LENGTH
from dlopt.lab.benchmark.results import Measure
from dlopt.lab.benchmark.scores import Interval, Standing
from dlopt.results.intervals import statistic

MEASURE_LABELS: Mapping[Measure, str] = {
    "updates": "updates", "evaluations": "evaluations of the loss", "time": "time",
}  # fmt: skip
NONE = "-"
SELF_TUNING = f"Self-tuning: fixed keys, one trial per seed, {SELF_TUNING_LENGTH} times the updates of external tuning."


def interval(value: Interval | None, form: Callable[[float], str] = "{:.2f}".format) -> str:
    """Formats 0.83 [0.71, 0.90], or 0.83 without an interval."""
    if value is None or math.isnan(value.value):
        return NONE
    return form(value.value) + ("" if math.isnan(value.low) else f" [{form(value.low)}, {form(value.high)}]")


def short_interval(value: Interval | None) -> str:
    """Formats 0.83 .71-.90, or 0.83 without an interval."""
    if value is None or math.isnan(value.low):
        return interval(value)
    low, high = (f"{each:.2f}".removeprefix("0") if each < 0.995 else "1.0" for each in (value.low, value.high))
    return f"{value.value:.2f} {low}-{high}"


def number(value: float | None, pattern: str = ".4g") -> str:
    return NONE if value is None or not math.isfinite(value) else format(value, pattern)


def updates(value: float) -> str:
    """Formats a number of updates; - if the target was not reached."""
    return number(value, ".0f")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def standing(of: Standing, workloads: int) -> list[str]:
    """Formats facts beside the score: reached targets, successful trials, cost and state."""
    reached = [f"{of.reached}/{workloads}", percent(of.sensitivity)]
    return [*reached, number(of.cost, ".2f"), number(of.state, ".1f")]


def names(items: Iterable[str]) -> str:
    """Joins names: a, b and c."""
    *first, last = map(printable, items)
    return f"{', '.join(first)} and {last}" if first else last


def abbreviated(name: str, width: int) -> str:
    """Returns a printable name of at most `width` characters: its last part (the class of a.b.C), or start and end."""
    name = printable(name)
    if len(name) > width and all(part.isidentifier() for part in name.split(".")):
        name = name.rpartition(".")[2]
    if len(name) <= width:
        return name
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[-end:]}"


def drawn_value(value: Any) -> str:
    """Formats a hyperparameter of a trial."""
    return NONE if value is None else f"{value:.3g}" if isinstance(value, float) else text(value)


def mean_and_std(values: Sequence[float]) -> str:
    """Formats mean ± sample standard deviation; one value has no deviation."""
    found = statistic([value for value in values if math.isfinite(value)])
    if found is None:
        return NONE
    return f"{found.mean:.4g}" if found.std is None else f"{found.mean:.4g} ± {found.std:.2g}"
