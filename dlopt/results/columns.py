"""The columns of a leaderboard and the texts of its cells, for the terminal, the page, papers and CSV files."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dlopt.basics.folders import ENDED, short_path
from dlopt.basics.formats import format_amount, format_count, printable
from dlopt.basics.formats import format_value as text
from dlopt.basics.plain_values import flatten
from dlopt.metrics.declared import DECLARED
from dlopt.metrics.measures import MEASURES
from dlopt.metrics.names import VAL_LOSS, Metric, Split, split_of, validation_sets, without_set
from dlopt.metrics.shown import COLUMNS, format_metric, listed_in
from dlopt.results.intervals import Difference, Statistic
from dlopt.results.leaderboard import Record, Row
from dlopt.results.published import against_published, recipe_label
from dlopt.results.ranking import Ranking, time_to_target
from dlopt.results.reading import tags_of
from dlopt.results.remarks import texts
from dlopt.results.tables import Table, spreadsheet_cell

_SHOWN = listed_in("leaderboard")
_TEST = [name for name in _SHOWN if split_of(name) == "test"]
COSTS = [name for name in _SHOWN if COLUMNS[name].is_cost]
FIRST = [name for name in _SHOWN if name not in (*_TEST, *COSTS)]
"""Metrics of validation and training, the most important first."""
# Titles in the CSV file of the parts of a `Difference`.
_DIFFERENCE = {"mean": "difference", "low": "difference_low", "high": "difference_high", "count": "pairs"}


def metric_columns(ranking: Ranking) -> list[str]:
    """Returns the metrics of the leaderboard: the ranking metric, validation and training metrics, costs.

    Metrics that a run requests follow those of training, then the metrics on validation sets with names.
    """
    known = {name for record in ranking.records for name in record.metrics}
    # Omit costs that are equal for all ended runs; failed runs cost less in any case.
    ended = [record.metrics for record in ranking.records if record.status in ENDED]
    costs = [name for name in COSTS if len({metrics.get(name) for metrics in ended}) > 1]
    first = [*FIRST, *_requested(ranking, "val")]
    metrics = [ranking.by, *first, *on_named_sets(ranking, first)]
    return list(dict.fromkeys([*(name for name in metrics if name in known), *costs]))


def _requested(ranking: Ranking, split: Split) -> list[str]:
    """Returns the columns of the metrics that runs request by evaluate.metrics, without those of single classes."""
    names = dict.fromkeys(name for record in ranking.records for name in record.config.get("evaluate.metrics") or ())
    declared = [DECLARED[name].names if name in DECLARED else [name.rpartition(".")[2]] for name in names]
    return [Metric(split, each).column for some in declared for each in some]


def on_named_sets(ranking: Ranking, columns: Iterable[str]) -> list[str]:
    """Returns the validation metrics of `columns` on the validation sets with names, set by set."""
    sets = dict.fromkeys(name for record in ranking.records for name in validation_sets(flatten(record.config)))
    metrics = [metric for column in columns if (metric := Metric.of(column)) is not None and metric.split == "val"]
    return [metric.on_set(name).column for name in sets for metric in metrics]


def in_terminal(ranking: Ranking) -> list[str]:
    """Returns the metrics of a terminal; of validation sets with names, that by which the runs are ranked."""
    sets = [name for record in ranking.records for name in validation_sets(flatten(record.config))]
    of_sets = on_named_sets(ranking, [without_set(ranking.by, sets)])
    return [name for name in metric_columns(ranking) if name in (ranking.by, *listed_in("terminal"), *of_sets)]


def test_columns(ranking: Ranking) -> list[str]:
    """Returns the test metrics that the validation has, too: tests compute more than was requested."""
    known = {name for record in ranking.records for name in record.metrics}
    names = dict.fromkeys([*_TEST, *_requested(ranking, "test")])
    tested = [metric for name in names if name in known and (metric := Metric.of(name)) is not None]
    has_val = VAL_LOSS.column in known
    return [each.column for each in tested if not has_val or Metric("val", each.name).column in known]


def tags_text(row: Row) -> str:
    """Returns the tags of a configuration's runs: a, b."""
    return ", ".join(dict.fromkeys(printable(tag) for run in row.runs for tag in tags_of(run)))


def statistic_text(name: str, statistic: Statistic | None) -> str:
    """Formats 90.00 ± 1.00 %; the unit appears once."""
    if statistic is None:
        return "-"
    form = _form(name, [statistic.mean, statistic.std or 0.0])
    if statistic.std and name in MEASURES and MEASURES[name].format is format_amount:
        form = f"{{:,.{max(0, 1 - math.floor(math.log10(statistic.std)))}f}}".format  # two digits of the deviation
    shown = statistic.show(form)
    return shown.replace(" % ±", " ±").replace(" s ±", " ±").replace(" MiB ±", " ±")


def difference_text(name: str, difference: Difference | None) -> str:
    """Formats -5.00 [-5.06, +4.62]; differences of accuracies are in percentage points, without a unit."""

    if difference is None:
        return ""
    form = _form(name, [difference.mean, difference.low or 0.0, difference.high or 0.0])

    def signed(value: float) -> str:
        size = form(abs(value)).removesuffix(" %")
        return f"{'-' if value < 0 and re.search('[1-9]', size) else '+'}{size}"  # -0.00 is no number

    return difference.show(signed)


def _form(name: str, values: Sequence[float]) -> Callable[[float], str]:
    """Returns a format with common decimals: -0.0007 ± 0.0364, not -7.19e-04 ± 0.0364."""
    form = partial(format_metric, name)
    largest = form(max(map(abs, values)))
    is_decimal = re.fullmatch(r"\d+\.\d+", largest) is not None
    if not is_decimal or all("e" not in form(value) for value in values):
        return form
    return f"{{:.{len(largest.partition('.')[2])}f}}".format


def counts_text(ranking: Ranking) -> str:
    """Formats 2 configurations, 6 runs: 5 finished, 1 failed."""
    counts = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in ranking.counts().items())
    sizes = format_count("configurations", len(ranking.rows)), format_count("runs", len(ranking.records))
    return f"{', '.join(sizes)}: {counts}"


def failure_text(run: Record) -> str:
    """Returns why a run failed or did not finish."""
    killed = "no summary: the process was killed or the machine went down"
    return printable(run.reason or (killed if run.status == "unfinished" else "no reason recorded"))


def published_table(ranking: Ranking, top: int | None = None) -> Table:
    """Returns measured and published test errors in %, the unit of the papers, of the first `top` rows."""
    rows = []
    for each in against_published(ranking)[:top]:
        error, difference = "-", ""
        if each.measured is not None:
            error, difference = each.measured.show("{:.2f}".format), f"{each.measured.mean - each.published:+.2f}"
        median = "" if each.median is None else f"{each.median:.2f}"
        name, count = recipe_label(each, ranking), each.row.count("test_accuracy")
        rows.append([name, count, error, median, f"{each.published:.2f}", difference])
    return Table(["recipe", "runs", "test error %", "median", "published", "difference"], rows)


def summary_csv(ranking: Ranking, target: float | None, *, test: bool) -> str:
    """Renders a CSV line per configuration, with means and sample standard deviations over seeds."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    columns = _csv_columns(ranking, target, test=test)
    writer.writerow(spreadsheet_cell(column.title) for column in columns)
    for cells in zip(*(column.cells for column in columns), strict=True):
        writer.writerow(map(spreadsheet_cell, cells))
    return output.getvalue()


@dataclass(frozen=True)
class _Values:
    """A column of the CSV file, with a value per configuration."""

    title: str
    cells: Sequence[Any]


def _csv_columns(ranking: Ranking, target: float | None, *, test: bool) -> list[_Values]:
    rows, metrics = ranking.rows, metric_columns(ranking)
    columns = [_Values("rank", [row.rank for row in rows])]
    for key in ranking.keys:
        # The configured and the completed epochs are two columns.
        title = f"config.{key}" if key in metrics else key
        columns.append(_Values(title, [text(row.values[key]) if key in row.values else "" for row in rows]))
    columns.append(_Values("runs", [len(row.runs) for row in rows]))
    columns.append(_Values("ended", [sum(run.has_ended for run in row.runs) for row in rows]))
    columns.append(_Values("failed", [row.failed for row in rows]))
    for name in metrics:
        columns += _mean_and_std(name, [row.statistic(name) for row in rows])
    for name in test_columns(ranking):
        columns += _mean_and_std(name, [row.statistic(name) if test or row.is_first else None for row in rows])
    columns += _differences(rows)
    columns += _published_errors(ranking)
    if target is not None:
        columns += _times(ranking, target)
    found = ["; ".join(texts(ranking.remarks, rank)) for rank in range(1, len(rows) + 1)]
    if any(found):
        columns.append(_Values("remarks", found))
    tags = [tags_text(row) for row in rows]
    if any(tags):
        columns.append(_Values("tags", tags))
    columns.append(_Values("folders", [" ".join(short_path(run.path) for run in row.runs) for row in rows]))
    columns.append(_Values("command", [row.command or "" for row in rows]))
    return columns


def _mean_and_std(name: str, statistics: Sequence[Statistic | None]) -> list[_Values]:
    deviations = [None if each is None else each.std for each in statistics]
    return [_Values(name, _means(statistics)), _Values(f"{name}_std", deviations)]


def _means(statistics: Iterable[Statistic | None]) -> list[float | None]:
    return [None if each is None else each.mean for each in statistics]


def _differences(rows: Sequence[Row]) -> list[_Values]:
    """Returns the differences to the first row: mean, interval and number of pairs."""
    columns = []
    for name, title in _DIFFERENCE.items():
        values = [getattr(row.difference, name, None) for row in rows]  # the first row has no difference
        columns.append(_Values(title, values))
    return columns


def _published_errors(ranking: Ranking) -> list[_Values]:
    """Returns the measured and the published test errors; nothing if no row has a published one."""
    known = {id(result.row): result for result in against_published(ranking)}
    if not known:
        return []
    measured: list[Statistic | None] = []
    published: list[float | None] = []
    for row in ranking.rows:
        result = known.get(id(row))
        measured.append(None if result is None else result.measured)
        published.append(None if result is None else result.published)
    return [_Values("test_error_percent", _means(measured)), _Values("published_error_percent", published)]


def _times(ranking: Ranking, target: float) -> list[_Values]:
    """Returns how many runs reach the target, and their mean updates and seconds."""
    rows = ranking.rows
    reached = [time_to_target(row, ranking.by, target, ranking.lower) for row in rows]
    return [
        _Values("target", [target] * len(rows)),
        _Values("reached", [each.count for each in reached]),
        _Values("steps_to_target", _means(each.steps for each in reached)),
        _Values("seconds_to_target", _means(each.seconds for each in reached)),
    ]
