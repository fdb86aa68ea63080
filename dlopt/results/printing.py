"""Results on a terminal: the table of a report, the leaderboard and the Pareto front of a sweep."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from dlopt.basics import formats
from dlopt.basics.emphasis import emphasized
from dlopt.basics.folders import short_path
from dlopt.basics.formats import brief, format_count, printable
from dlopt.metrics.names import Metric
from dlopt.metrics.shown import COLUMNS, expendable_in, format_metric
from dlopt.results.best_run import best_of
from dlopt.results.columns import (
    counts_text,
    difference_text,
    failure_text,
    in_terminal,
    published_table,
    statistic_text,
    tags_text,
    test_columns,
)
from dlopt.results.leaderboard import Row
from dlopt.results.looks import remember
from dlopt.results.ranking import Ranking
from dlopt.results.reading import short_key
from dlopt.results.remarks import Remark, lines, mark
from dlopt.results.tables import Table
from dlopt.tracking.console import open_console
from dlopt.tracking.terminal_text import FittedTable, plain_table

if TYPE_CHECKING:
    from dlopt.results.exports import ReportContent

_MAX_KEYS = 6  # config keys in the printed table
_MAX_FAILED = 5  # runs with their reasons
_MAX_ROWS = 12  # of a sweep's leaderboard
_WIDTH = 130  # characters of a line of a sweep's leaderboard in a file
_TEXTS: Mapping[str, Any] = {"overflow": "fold"}
_NUMBERS: Mapping[str, Any] = {"justify": "right"}
_COUNTS: Mapping[str, Any] = {**_NUMBERS, "min_width": len("1 failed")}  # wrapped: "2 of 3, 1 failed"


# -- the report


def show_report(report: "ReportContent", console: Console) -> None:
    """Prints the leaderboard; on a terminal hides columns until it fits, the least important ones first."""
    dropped = _unfitting(report, console) if console.is_terminal else []
    grids = [_grid(report, dropped)]
    published = published_table(report.ranking, report.top)
    if published.rows:
        grids.append(published.grid())
    if not console.is_terminal:
        unlimited = console.options.update(width=1000)
        console.width = max(console.measure(grid.table, options=unlimited).maximum for grid in grids)
    leaderboard, *others = grids
    console.print(leaderboard)
    for line in lines(report.ranking.remarks, report.top):
        _print_line(printable(line), console)
    for grid in others:
        console.print(grid)
    for line in _hidden(report.ranking, dropped):
        console.print(Text(printable(line)), soft_wrap=not console.is_terminal)
    for line in map(printable, _notes(report)):
        _print_line(line, console)


def _print_line(line: str, console: Console) -> None:
    """Prints a line, which is wrapped on a terminal."""
    if console.is_terminal:
        line = _wrapped(line, console.width)
    console.print(emphasized(line), soft_wrap=True)


def _wrapped(line: str, width: int) -> str:
    if line.startswith(("best: ", "best run: ", "command: ", "run: ")):  # a command, or a path, is to be copied whole
        return line
    return "\n".join(formats.wrap(line, width))  # rich would break long paths, too


def _unfitting(report: "ReportContent", console: Console) -> list[str]:
    """Returns the columns to hide; none if the terminal is too narrow for any table, which then becomes a list."""
    expendable = expendable_in("terminal")
    expendable += [name for name in in_terminal(report.ranking) if name not in COLUMNS]  # on validation sets with names
    if not report.test:
        expendable.append("test")
    for count in range(len(expendable) + 1):
        grid = _grid(report, expendable[:count])
        if grid.fits(console, console.width):
            return expendable[:count]
    return expendable if grid.fits(console, console.width, folded=True) else []


def _grid(report: "ReportContent", dropped: Collection[str]) -> FittedTable:
    """Returns the leaderboard without the columns `dropped`: metrics, and "test"."""
    ranking = report.ranking
    rows = ranking.rows[: report.top]
    is_single = len(ranking.records) == 1  # which nothing is ranked against
    columns = [] if is_single else [_ranks("#", ranking.remarks, rows)]
    for key in list(ranking.keys)[:_MAX_KEYS]:
        values = [printable(brief(row.values[key])) if key in row.values else "-" for row in rows]
        columns.append(_Column(printable(short_key(key, ranking.keys)), values, _TEXTS))
    if any(map(tags_text, ranking.rows)):
        columns.append(_Column("tags", [tags_text(row) or "-" for row in rows], _TEXTS))
    if not is_single:
        columns.append(_Column("runs", [row.count_with_failed(ranking.by) for row in rows], _COUNTS))
    for name in in_terminal(ranking):
        if name == ranking.by or name not in dropped:
            columns.append(_Column(name.replace("_", " "), [_statistic(name, row) for row in rows], _NUMBERS))
    tests = [] if "test" in dropped else test_columns(ranking)[:1]
    for name in tests:
        cells = [_statistic(name, row) if report.test or row.is_first else "" for row in rows]
        columns.append(_Column(name.replace("_", " "), cells, _NUMBERS))
    if any(row.difference is not None for row in ranking.rows):
        differences = [difference_text(ranking.by, row.difference) for row in rows]
        interval = " [95 %]" if any("[" in text for text in differences) else ""
        columns.append(_Column(f"vs. best{interval}", differences, _NUMBERS))
    return _filled(plain_table(), columns, ["bold" if row.is_first else "" for row in rows])


def _statistic(name: str, row: Row) -> str:
    """Formats a statistic in little space: times and counts without their standard deviation."""
    statistic, measure = row.statistic(name), COLUMNS.get(name)
    if statistic is None or measure is None or measure.brief is None or "terminal" not in measure.shown:
        return statistic_text(name, statistic)
    return measure.brief(statistic.mean)


def _hidden(ranking: Ranking, dropped: Collection[str]) -> list[str]:
    """Names the parts missing from the printed table, and gives the best row's test metric if its column is hidden."""
    lines = []
    if "test" in dropped and ranking.best is not None:
        for name in test_columns(ranking)[:1]:
            if ranking.best.statistic(name) is not None:
                lines.append(f"{name.replace('_', ' ')} of the best: {_statistic(name, ranking.best)}")
    names = list(ranking.keys)[_MAX_KEYS:]
    names += [name for name in in_terminal(ranking) if name in dropped and name != ranking.by]
    if names:
        lines.append(f"hidden: {', '.join(names)}; index.html has all columns")
    return lines


def _notes(report: "ReportContent") -> list[str]:
    """Returns the lines below the table: counts, the best command, failed runs, warnings, notes of packages."""
    ranking = report.ranking
    counts = counts_text(ranking)
    if len(ranking.rows) > report.top:
        counts += f"; {format_count('more rows', len(ranking.rows) - report.top)} on the HTML page"
    notes = [counts]
    if ranking.ranked:
        notes += [sentence] if (sentence := ranking.verdict) else []
        first = ranking.ranked[0]
        if first.failed:
            notes.append(f"#1: {first.failed} of {len(first.runs)} runs failed; its mean is that of the others")
        if ranking.best is not None and ranking.best.command is not None:
            notes.append(f"{'command' if len(ranking.records) == 1 else 'best'}: {ranking.best.command}")
            notes += [f"it needs {ranking.best.needs}"] if ranking.best.needs else []
        if (run := best_of(ranking.board)) is not None:
            notes.append(f"{'run' if len(ranking.records) == 1 else 'best run'}: {short_path(run.path)}")
    for run in ranking.failed[:_MAX_FAILED]:
        notes.append(f"{run.status}: {short_path(run.path)}: {failure_text(run)}")
    others = len(ranking.failed) - _MAX_FAILED
    if others > 0:
        notes.append(f"... and {format_count('more failed or unfinished runs', others)}")
    for each in ranking.damaged:
        notes.append(f"skipped: {short_path(each.path)}: {each.reason}")
    for section in report.sections:
        notes += section.lines
    return notes


# -- results of a sweep: leaderboard or Pareto front


def show_leaderboard(ranking: Ranking, *, is_final: bool = True, stream: IO[str] | None = None) -> None:
    """Prints the best rows, with their differences to the first, and the verdict of a sweep that `is_final`.

    Shows the test metric of the first row only: selecting a row by its test metric would be model selection on the test
    set.
    """
    if not ranking.ranked:
        return
    rows, by = ranking.rows[:_MAX_ROWS], ranking.by
    name = by.replace("_", " ")
    better = "lower" if ranking.lower else "higher"
    is_paired = any(row.difference is not None and row.difference.count > 1 for row in rows)
    columns = [
        _ranks("", ranking.remarks, rows),
        _Column("configuration", [formats.round_floats(row.label) for row in rows], _TEXTS),
        _Column("mean ± std" if is_paired else name, [statistic_text(by, row.value) for row in rows], _NUMBERS),
        _Column("runs", [row.count_with_failed(by) for row in rows], _COUNTS),
    ]
    if is_paired:
        differences = [difference_text(by, row.difference) for row in rows]
        columns.append(_Column("vs. best\n[95 %]", differences, _NUMBERS))
    tests = [_test_text(by, row) if row.is_first else "" for row in rows]
    title, styles = f"{name} ({better} is better)", [""] * len(rows)
    table = _filled(plain_table(title), [*columns, _Column("test", tests, _NUMBERS)], styles)
    more = [f"... and {len(ranking.rows) - _MAX_ROWS} more"] if len(ranking.rows) > _MAX_ROWS else []
    _, console, terminal = open_console(stream)
    if terminal and not table.fits(console, console.width, folded=True):
        table = _filled(plain_table(title), columns, styles)
        more += [f"test of the best: {tests[0]}"] if tests[0] and ranking.best is not None else []
    more += lines(ranking.remarks, len(rows))
    if is_final and (sentence := ranking.verdict):
        more.append(sentence)
    if (run := best_of(ranking.board)) is not None:
        more.append(f"best run: {short_path(run.path)}")
    _print(table, stream, [*map(printable, more)])


def show_end(ranking: Ranking, folder: Path, *, is_final: bool) -> None:
    """Prints the leaderboard of a sweep that has ended, and records in its folder that it was seen."""
    show_leaderboard(ranking, is_final=is_final)
    if is_final:
        remember(ranking.board, [folder], ranking.seen)


def _test_text(by: str, row: Row) -> str:
    """Formats the mean of the test metric that belongs to the metric of the leaderboard; "" if there is none."""
    ranked = Metric.of(by)
    test = by if ranked is None else Metric("test", ranked.name).column
    statistic = row.statistic(test)
    return "" if statistic is None else format_metric(test, statistic.mean)


def show_front(rows: Sequence[tuple[str, Sequence[float]]], metrics: Sequence[str]) -> None:
    """Prints the Pareto front of a multi-objective search, if any job has finished."""
    if not rows:
        return
    heads = ["configuration"]
    heads += [metric.replace("_", " ") for metric in metrics]
    cells = []
    for label, values in rows:
        cells.append([formats.round_floats(label), *map(format_metric, metrics, values)])
    _print(Table(heads, cells, title="Pareto front").grid())


# -- tables


@dataclass(frozen=True)
class _Column:
    """A column of a printed table, with a cell per row. `form`: further arguments of rich's `add_column`."""

    title: str
    cells: Sequence[str]
    form: Mapping[str, Any]


def _ranks(title: str, found: Sequence[Remark], rows: Sequence[Row]) -> _Column:
    """Returns the column with the ranks of the rows, which equal rows share, and the letters of the remarks: 1 a."""
    width = len(str(len(rows)))
    ranks = [f"{row.place.removesuffix('='):>{width}}{'=' * row.is_tied}" for row in rows]
    cells = [f"{rank} {mark(found, position)}".rstrip() for position, rank in enumerate(ranks, 1)]
    return _Column(title, cells, {})


def _filled(table: Grid, columns: Sequence[_Column], styles: Sequence[str]) -> FittedTable:
    """Fills an empty table; `styles`: of each row."""
    for column in columns:
        table.add_column(Text(column.title), **column.form)
    for *cells, style in zip(*(column.cells for column in columns), styles, strict=True):
        table.add_row(*map(Text, cells), style=style)
    return FittedTable(table)


def _print(table: FittedTable, stream: IO[str] | None = None, more: Sequence[str] = ()) -> None:
    """Prints a table, and the lines `more` below it."""
    output, console, terminal = open_console(stream)
    console.width = console.width if terminal else _WIDTH
    with console.capture() as capture:
        console.print(table)
    printed = [line.rstrip() for line in capture.get().splitlines()]
    printed += [_wrapped(line, console.width) if terminal else line for line in more]
    output.write("\n" + "".join(f"{line}\n" for line in printed))
    output.flush()
