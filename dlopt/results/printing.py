"""Results on a terminal: the table of a report, the leaderboard and the Pareto front of a sweep."""

import textwrap
from collections.abc import Collection, Sequence
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from dlopt.basics import formats
from dlopt.basics.formats import brief, format_count, printable
from dlopt.metrics.names import Metric
from dlopt.metrics.shown import COLUMNS, expendable_in, format_metric, listed_in
from dlopt.results.columns import (
    counts_text,
    difference_text,
    failure_text,
    metric_columns,
    published_table,
    statistic_text,
    tags_text,
    test_columns,
)
from dlopt.results.leaderboard import Leaderboard, Statistic, cautions
from dlopt.results.ranking import Ranking, mixtures
from dlopt.results.reading import short_key
from dlopt.results.tables import Table
from dlopt.tracking import terminal_text
from dlopt.tracking.console import open_console
from dlopt.tracking.terminal_text import FittedTable, plain_table

if TYPE_CHECKING:
    from dlopt.results.exports import ReportContent

_MAX_KEYS = 6  # config keys in the printed table
_MAX_ROWS = 12  # of a sweep's leaderboard
_WIDTH = 130  # columns of a sweep's leaderboard in a file


def show_report(report: "ReportContent", console: Console) -> None:
    """Prints the leaderboard; on a terminal hides columns until it fits, the least important ones first."""
    ranking = report.ranking
    dropped = _unfitting(report, console) if console.is_terminal else []
    grids = [FittedTable(_grid(report, dropped))]
    if (published := published_table(ranking, report.top)).rows:
        grids.append(published.grid())
    if not console.is_terminal:
        unlimited = console.options.update(width=1000)
        console.width = max(console.measure(grid.table, options=unlimited).maximum for grid in grids)
    for grid in grids:
        console.print(grid)
    for line in _hidden(ranking, dropped):
        console.print(Text(printable(line)), soft_wrap=not console.is_terminal)
    for line in map(printable, _notes(report)):
        if console.is_terminal and not line.startswith("best: "):  # a command is to be copied whole
            # Rich would break long paths, too.
            line = textwrap.fill(line, console.width, break_long_words=False, break_on_hyphens=False)
        console.print(Text(line), soft_wrap=True)


def _unfitting(report: "ReportContent", console: Console) -> list[str]:
    """Returns the columns to hide; none if the terminal is too narrow for any table, which then becomes a list."""
    expendable = [*expendable_in("terminal"), *([] if report.test else ["test"])]
    candidates = [expendable[:count] for count in range(len(expendable) + 1)]
    fitted = [(dropped, FittedTable(_grid(report, dropped))) for dropped in candidates]
    for dropped, grid in fitted:
        if grid.fits(console, console.width):
            return dropped
    return expendable if fitted[-1][1].fits(console, console.width, folded=True) else []


def _grid(report: "ReportContent", dropped: Collection[str]) -> Grid:
    ranking = report.ranking
    metrics = [name for name in _metrics(ranking) if name == ranking.by or name not in dropped]
    tests = [] if "test" in dropped else test_columns(ranking)[:1]
    keys = list(ranking.keys)[:_MAX_KEYS]
    compared = any(row.difference is not None for row in ranking.rows)
    grid = plain_table(right=["#"])
    for key in keys:
        grid.add_column(Text(printable(short_key(key, ranking.keys))), overflow="fold")
    has_tags = any(map(tags_text, ranking.rows))
    if has_tags:
        grid.add_column("tags", overflow="fold")
    grid.add_column("runs", justify="right")
    for name in (*metrics, *tests):
        grid.add_column(name.replace("_", " "), justify="right")
    if compared:
        grid.add_column(Text("vs. best [95 % CI]"), justify="right")
    for rank, row in enumerate(ranking.rows[: report.top], 1):
        cells = [printable(brief(row.values[key])) if key in row.values else "-" for key in keys]
        cells += [tags_text(row) or "-"] if has_tags else []
        values = [_statistic(name, row.statistic(name)) for name in metrics]
        values += [_statistic(name, row.statistic(name)) if report.test or rank == 1 else "" for name in tests]
        difference = [difference_text(ranking.by, row.difference)] if compared else []
        style = "bold" if rank == 1 and row.value is not None else ""
        grid.add_row(str(rank), *map(Text, cells), row.count(ranking.by), *values, *map(Text, difference), style=style)
    return grid


def _metrics(ranking: Ranking) -> list[str]:
    return [name for name in metric_columns(ranking) if name in (ranking.by, *listed_in("terminal"))]


def _hidden(ranking: Ranking, dropped: Collection[str]) -> list[str]:
    """Names the parts missing from the printed table, and gives the best row's test metric if its column is hidden."""
    lines = []
    if "test" in dropped and ranking.rows:
        values = [(name, ranking.rows[0].statistic(name)) for name in test_columns(ranking)[:1]]
        lines += [f"{name.replace('_', ' ')} of the best: {_statistic(name, value)}" for name, value in values if value]
    names = [
        *list(ranking.keys)[_MAX_KEYS:],
        *(name for name in _metrics(ranking) if name in dropped and name != ranking.by),
    ]
    return [*lines, *([f"hidden: {', '.join(names)}; index.html has all columns"] if names else [])]


def _statistic(name: str, statistic: Statistic | None) -> str:
    """Formats a statistic in little space: times and counts without their standard deviation."""
    measure = COLUMNS.get(name)
    if statistic is None or measure is None or measure.brief is None or "terminal" not in measure.shown:
        return statistic_text(name, statistic)
    return measure.brief(statistic.mean)


def _notes(report: "ReportContent") -> list[str]:
    ranking = report.ranking
    lines = [counts_text(ranking)]
    if len(ranking.rows) > report.top:
        lines[0] += f"; {format_count('more rows', len(ranking.rows) - report.top)} on the HTML page"
    if ranking.ranked and (failed := ranking.ranked[0].failed):
        lines.append(f"#1: {failed} of {len(ranking.ranked[0].runs)} runs failed; its mean is that of the others")
    best = ranking.ranked[0].command if ranking.ranked else None
    lines += [] if best is None else [f"best: {best}"]
    for run in ranking.failed[:5]:
        lines.append(f"{run.status}: {terminal_text.short_path(run.path)}: {failure_text(run)}")
    if (others := len(ranking.failed) - 5) > 0:
        lines.append(f"... and {format_count('more failed or unfinished runs', others)}")
    lines += mixtures(ranking)
    lines += [f"skipped: {terminal_text.short_path(each.path)}: {each.reason}" for each in ranking.damaged]
    return [*lines, *(line for section in report.sections for line in section.lines)]


# -- results of a sweep: leaderboard or Pareto front


def show_leaderboard(board: Leaderboard, *, stream: IO[str] | None = None) -> None:
    """Prints the best rows, with their differences to the first.

    Shows the test metric of the first row only: selecting a row by its test metric would be model selection on the test
    set.
    """
    rows = [row for row in board.rows if row.value is not None]
    if not rows:
        return
    is_paired = any(row.difference is not None and row.difference.count > 1 for row in rows)
    ranked = Metric.of(board.metric)
    test = board.metric if ranked is None else Metric("test", ranked.name).column
    metric, better = board.metric.replace("_", " "), "higher" if board.direction == "maximize" else "lower"
    table = plain_table(f"{metric} ({better} is better)", left=[""], fold=["configuration"])
    table.add_column("mean ± std" if is_paired else metric, justify="right", no_wrap=True)
    table.add_column("runs", justify="right")
    if is_paired:
        table.add_column("vs. best\n(95 % CI)", justify="right", no_wrap=True)
    table.add_column("test", justify="right")
    for rank, row in enumerate(rows[:_MAX_ROWS], 1):
        tested = row.statistic(test) if rank == 1 else None
        cells = [str(rank), formats.round_floats(row.label)]
        cells += [statistic_text(board.metric, row.value), row.count(board.metric)]
        cells += [difference_text(board.metric, row.difference)] if is_paired else []
        table.add_row(*cells, "" if tested is None else format_metric(test, tested.mean))
    more = [f"... and {len(rows) - _MAX_ROWS} more"] * (len(rows) > _MAX_ROWS)
    more += map(printable, cautions(board.rows, board.metric, board.direction))
    _print(FittedTable(table), stream, "".join(f"{line}\n" for line in more))


def show_front(rows: Sequence[tuple[str, Sequence[float]]], metrics: Sequence[str]) -> None:
    """Prints the Pareto front of a multi-objective search, if any job has finished."""
    if not rows:
        return
    heads = ["configuration", *(metric.replace("_", " ") for metric in metrics)]
    cells = [[formats.round_floats(label), *map(format_metric, metrics, values)] for label, values in rows]
    _print(Table(heads, cells, title="Pareto front").grid())


def _print(table: FittedTable, stream: IO[str] | None = None, more: str = "") -> None:
    output, console, terminal = open_console(stream)
    console.width = console.width if terminal else _WIDTH
    with console.capture() as capture:
        console.print(table)
    output.write("\n" + "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()) + more)
    output.flush()
