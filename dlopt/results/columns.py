"""The columns of a leaderboard and the texts of its cells, for the terminal, the page, papers and CSV files."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dlopt.basics.formats import format_count, printable
from dlopt.basics.formats import format_value as text
from dlopt.metrics.names import split_of
from dlopt.metrics.shown import COLUMNS, format_metric, listed_in
from dlopt.results.leaderboard import ENDED, Difference, Record, Row, Statistic
from dlopt.results.published import against_published, recipe_label
from dlopt.results.ranking import Ranking, time_to_target
from dlopt.results.reading import tags_of
from dlopt.results.tables import Table, spreadsheet_cell
from dlopt.tracking.terminal_text import short_path

_SHOWN = listed_in("leaderboard")
_TEST = [name for name in _SHOWN if split_of(name) == "test"]
_COST = [name for name in _SHOWN if COLUMNS[name].is_cost]
FIRST = [name for name in _SHOWN if name not in (*_TEST, *_COST)]
"""Metrics of validation and training, the most important first."""


def metric_columns(ranking: Ranking) -> list[str]:
    """Returns the metrics of the leaderboard: the ranking metric, validation and training metrics, costs."""
    known = {name for record in ranking.records for name in record.metrics}
    # Omit costs that are equal for all ended runs; failed runs cost less in any case.
    ended = [record.metrics for record in ranking.records if record.status in ENDED]
    costs = [name for name in _COST if len({metrics.get(name) for metrics in ended}) > 1]
    return list(dict.fromkeys([*(name for name in (ranking.by, *FIRST) if name in known), *costs]))


def test_columns(ranking: Ranking) -> list[str]:
    return [name for name in _TEST if any(name in record.metrics for record in ranking.records)]


def tags_text(row: Row) -> str:
    """Returns the tags of a configuration's runs: a, b."""
    return ", ".join(dict.fromkeys(printable(tag) for run in row.runs for tag in tags_of(run)))


def statistic_text(name: str, statistic: Statistic | None) -> str:
    """Formats 90.00 ± 1.00 %; the unit appears once."""
    if statistic is None:
        return "-"
    shown = statistic.show(_form(name, [statistic.mean, statistic.std or 0.0]))
    return shown.replace(" % ±", " ±").replace(" s ±", " ±")


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
    metrics, tests = metric_columns(ranking), test_columns(ranking)
    # The configured and the completed epochs are two columns.
    header = ["rank", *(f"config.{key}" if key in metrics else key for key in ranking.keys), "runs", "ended", "failed"]
    header += [f"{name}{end}" for name in (*metrics, *tests) for end in ("", "_std")]
    header += ["difference", "difference_low", "difference_high", "pairs"]
    known = {id(result.row): result for result in against_published(ranking)}
    header += ["test_error_percent", "published_error_percent"] if known else []
    header += [] if target is None else ["target", "reached", "steps_to_target", "seconds_to_target"]
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    has_tags = any(map(tags_text, ranking.rows))
    writer.writerow(map(spreadsheet_cell, [*header, *(["tags"] if has_tags else []), "folders", "command"]))
    for rank, row in enumerate(ranking.rows, 1):
        visible = metrics + (tests if test or rank == 1 else [])
        cells: list[Any] = [rank, *(text(row.values[key]) if key in row.values else "" for key in ranking.keys)]
        cells += [len(row.runs), sum(run.has_ended for run in row.runs), row.failed]
        for name in (*metrics, *tests):
            cells += _mean_and_std(row.statistic(name) if name in visible else None)
        cells += [""] * 4 if row.difference is None else vars(row.difference).values()
        if known:
            reference = known.get(id(row))
            cells += [reference and reference.measured and reference.measured.mean, reference and reference.published]
        if target is not None:
            reached = time_to_target(row, ranking.by, target, ranking.lower)
            cells += [target, reached.count, _mean_and_std(reached.steps)[0], _mean_and_std(reached.seconds)[0]]
        cells += [tags_text(row)] if has_tags else []
        cells += [" ".join(short_path(run.path) for run in row.runs), row.command or ""]
        writer.writerow(map(spreadsheet_cell, cells))
    return output.getvalue()


def _mean_and_std(statistic: Statistic | None) -> list[float | None]:
    return [None, None] if statistic is None else [statistic.mean, statistic.std]
