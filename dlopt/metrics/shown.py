"""Display of a run's metrics: columns, titles and formats, including undeclared metrics."""

from collections.abc import Mapping

from dlopt.basics.formats import format_number, format_percent
from dlopt.metrics.declaration import Declaration
from dlopt.metrics.declared import DECLARED
from dlopt.metrics.measures import KEPT, MEASURES, OTHERS, PROGRESS, Measure, Place
from dlopt.metrics.names import Metric, Split, base_name, in_words


def _evaluated(split: Split, name: str, priority: int = 0, **shown: int | None) -> Measure:
    """Returns the column of a metric that an evaluation computes."""
    metric, column = DECLARED[name], Metric(split, name).column
    return Measure(column, metric.title(split), metric.show, metric.direction, shown, priority)  # type: ignore[arg-type]


_EVALUATED = (
    _evaluated("train", "loss", 70, table=KEPT, log=KEPT, live=KEPT, leaderboard=10, sweep=KEPT),
    _evaluated("train", "accuracy", 60, table=80, log=KEPT, live=KEPT, leaderboard=20),
    _evaluated("val", "loss", 50, table=KEPT, log=KEPT, live=KEPT, leaderboard=KEPT, terminal=20, runs=KEPT,
               details=KEPT, sweep=KEPT, python=KEPT),
    _evaluated("val", "accuracy", 10, table=KEPT, log=KEPT, live=KEPT, leaderboard=KEPT, runs=KEPT, sweep=KEPT,
               python=KEPT),
    _evaluated("val", "bits_per_byte", table=KEPT),
    _evaluated("val", "perplexity", table=KEPT),
    # The run adds the metrics of labels and of the user to the table of epochs: see `EpochRows`.
    _evaluated("val", "mean_average_precision", 20, leaderboard=KEPT),
    _evaluated("val", "macro_f1", 30, leaderboard=KEPT),
    _evaluated("val", "micro_f1", 40, leaderboard=KEPT),
    _evaluated("test", "loss", 50, leaderboard=KEPT, python=KEPT),
    _evaluated("test", "accuracy", 10, leaderboard=KEPT, python=KEPT),
    _evaluated("test", "mean_average_precision", 20, leaderboard=KEPT),
    _evaluated("test", "macro_f1", 30, leaderboard=KEPT),
    _evaluated("test", "micro_f1", 40, leaderboard=KEPT),
)  # fmt: skip
COLUMNS: Mapping[str, Measure] = {each.name: each for each in (*PROGRESS, *_EVALUATED, *OTHERS)}
"""All columns, including columns that are only in files."""

# -- where


def shown_in(place: Place) -> list[Measure]:
    """Returns the columns of a place, in the order of their declaration."""
    return [each for each in COLUMNS.values() if place in each.shown]


def listed_in(place: Place) -> list[str]:
    """Returns the columns of a place with a column or line per run, the most important first."""
    return [each.name for each in sorted(shown_in(place), key=lambda each: each.priority)]


def expendable_in(place: Place) -> list[str]:
    """Returns the columns that a narrow terminal or page hides, in this order."""
    hidden = {each.name: number for each in shown_in(place) if (number := each.shown[place]) is not None}
    return sorted(hidden, key=lambda name: hidden[name])


# -- how


def _declaration(name: str) -> Declaration | None:
    """Returns the declaration of a metric of an evaluation, with or without its split and class."""
    return DECLARED.get(base_name(name).partition("/")[0])


def is_percent(name: str) -> bool:
    """Returns whether plots show the metric in percent, and its differences in percentage points.

    If it is not declared as a metric of an evaluation, its name decides: an accuracy, or the gap of an accuracy.
    """
    declared = _declaration(name)
    return "accuracy" in name if declared is None else declared.unit == "%"


def unit_of(name: str) -> str:
    """Returns the unit of the numbers in plots: % or, of the gap of an accuracy, points; "" of others."""
    return "" if not is_percent(name) else "points" if name.endswith("_gap") else "%"


def format_metric(name: str, value: float | None) -> str:
    """Formats a metric by its name: accuracies in percent, times, counts, learning rates, others as numbers.

    Undeclared metrics are fractions if they are named as an accuracy, or if their name ends in top1 or top5.
    """
    if (shown := MEASURES.get(name) or _declaration(name)) is not None:
        return shown.show(value)
    is_fraction = is_percent(name) or name.endswith(("top1", "top5"))
    return format_percent(value) if is_fraction else format_number(value)


def title(column: str) -> str:
    """Returns the header of a column in the table of epochs: val acc."""
    if column in COLUMNS:
        return COLUMNS[column].title
    metric = Metric.of(column)
    declared = None if metric is None else DECLARED.get(metric.name)
    if metric is None or declared is None or declared.name != metric.name:
        return column.replace("_", " ")
    return declared.title(metric.split)


def live_name(column: str) -> str:
    """Returns the name of a column in the live display, where the split is the name of the line: loss, MFU."""
    metric = Metric.of(column)
    return title(column) if metric is None else metric.name


def words(name: str) -> str:
    """Returns the name of a metric on the page: validation accuracy."""
    return (name in MEASURES and MEASURES[name].words) or in_words(name)


def axis_label(name: str) -> str:
    """Returns the label of a metric in plots, without a unit."""
    return (name in MEASURES and MEASURES[name].axis) or in_words(name)
