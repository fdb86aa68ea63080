"""`dlopt report`: compares runs and sweeps in a table, plots and an HTML page."""

import contextlib
import operator
import time
import webbrowser
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Annotated

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from dlopt.commands.command import take_own, writing
from dlopt.commands.runs import split_folders
from dlopt.commands.usage import own_keys
from dlopt.config.overrides import key_of
from dlopt.errors import DONE, UserError, suggest
from dlopt.files import write_atomically
from dlopt.interruption import Interruption
from dlopt.ranges import Count
from dlopt.results.exports import Destination, Format, ReportContent, destination, outdated, render
from dlopt.results.leaderboard import Difference, Leaderboard, Row, Statistic
from dlopt.results.page import columns, serve, test_columns
from dlopt.results.reading import Damaged, Record, RunReader, brief, printable, short_key
from dlopt.results.table import PublishedRow, Table, against_published, default_target, gather, recipe_label
from dlopt.tracking import layout
from dlopt.tracking.console import open_console
from dlopt.tracking.layout import FittedTable, plain_table

USAGE = """\
Compare runs and sweeps

Usage: dlopt report DIR... [key=value] [--watch] [--open]

Examples:
  dlopt report outputs/night
  dlopt report outputs/night by=val_loss target=0.4
  dlopt report outputs/night output=paper.pdf     # all plots, one per page
  dlopt report outputs/night output=table.tex     # a table with booktabs
  dlopt report outputs/night format=[pdf,latex]   # a file per plot, and table.tex
  dlopt report outputs/night --watch --open       # live view of a running sweep

Searches the folders recursively for runs, prints a leaderboard, and writes DIR/report/: index.html (works offline),
summary.csv and plots. Runs that differ only in their seeds count as one configuration.

  {_Options}
"""

_REFRESH = 5.0  # seconds
_MAX_KEYS = 6  # config keys in the printed table
_MAX_ROWS = 12  # of a sweep's leaderboard
_NAMED = ("index.html", "summary.csv")  # files of the default report that are named at its end; the plots are beside
_WIDTH = 130  # columns of a sweep's leaderboard in a file


@dataclass(frozen=True, kw_only=True)
class _Options:
    by: Annotated[
        str | None, "METRIC: validation metric to rank by (default: val_accuracy, or val_loss for regression)"
    ] = None
    target: Annotated[
        float | None,
        "X: metric value for the time-to-target column, accuracies as 0..1 (default: one that half of the "
        "configurations reach)",
    ] = None
    test: Annotated[bool, "BOOL: show the test metrics of all rows (default: false, only of the best)"] = False
    top: Annotated[Count, "N: rows of the printed table, and of LaTeX and Markdown tables"] = 20
    output: Annotated[
        str | None,
        "PATH: folder of the report (default: report in the first DIR), or one file: .html, .csv, .tex, .md, .pdf, "
        ".png or .svg",
    ] = None
    format: Annotated[
        Format | list[Format] | None,
        "NAME: html, csv, latex, markdown, pdf, png, svg, or a list (default: [html,csv,png])",
    ] = None
    plot: Annotated[str | None, "NAME: only this plot, such as learning_curves or lr_sensitivity"] = None
    watch: Annotated[bool, "--: update the report whenever a run writes, until interrupted"] = False
    open: Annotated[bool, "--: serve the page on localhost and open it in the browser, until interrupted"] = False


def report(arguments: list[str]) -> int:
    """Writes and prints the report; with `--watch` or `--open` runs until interrupted. Raises `UserError`."""
    folders, rest = split_folders(arguments)
    own, others = take_own(_Options, rest, "report")
    for argument in others:
        if "=" not in argument:
            raise UserError(f"{argument}: no such folder")
        names = [key.line if key.is_flag else key.name for key in own_keys(_Options)]
        hint = suggest(key_of(argument), names, "dlopt report --help")
        raise UserError(f"{argument}: unknown key; {hint}")
    options = _Options(**own)
    if not folders:
        raise UserError("report: needs a folder of runs: dlopt report outputs/NAME")
    to = destination(folders[0], options.output, options.format, options.plot)
    if options.open and to.page is None:
        raise UserError("--open: shows the page; needs a folder with html among its formats")
    reader, console = RunReader(), Console(highlight=False)
    state = _update(reader, folders, to, options, console)
    if not (options.watch or options.open):
        return DONE
    with contextlib.ExitStack() as stack:
        if options.open and to.page is not None:
            address = stack.enter_context(serve(to.page))
            print(f"{address}  (press Ctrl+C to quit)", flush=True)
            with contextlib.suppress(webbrowser.Error):
                webbrowser.open(address)
        # A stop flag, because a KeyboardInterrupt may be swallowed by the plotting libraries.
        with Interruption() as stop, contextlib.suppress(KeyboardInterrupt):
            while not _wait(stop, _REFRESH):
                if options.watch:
                    state = _update(reader, folders, to, options, console, before=state)
    return DONE


def _wait(stop: Interruption, seconds: float) -> bool:
    """Waits until `stop` is true, at most `seconds`; returns `stop`."""
    deadline = time.monotonic() + seconds
    while not stop and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(stop)


def _update(
    reader: RunReader,
    folders: Sequence[Path],
    to: Destination,
    options: _Options,
    console: Console,
    before: Sequence[Record | Damaged] | None = None,
) -> Sequence[Record | Damaged]:
    """Reads the runs and writes the report, unless the runs are unchanged since `before`. Returns their state."""
    records, damaged = reader.read(folders)
    if not records and not options.watch:
        hint = f"; {len(damaged)} damaged: {layout.short_path(damaged[0].path)}: {damaged[0].reason}" if damaged else ""
        raise UserError(f"{' '.join(map(str, folders))}: contains no runs{hint}")
    state: list[Record | Damaged] = [*records, *damaged]
    if before is not None and len(before) == len(state) and all(map(operator.is_, before, state)):
        return before
    is_early = options.watch and not any(record.metrics for record in records)  # `by` cannot be checked yet
    table = gather(records, damaged, None if is_early else options.by)
    goal = default_target(table) if options.target is None else options.target
    title = "Runs in " + ", ".join(layout.short_path(folder) for folder in folders)
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    refresh = _REFRESH if options.watch else None
    files = render(to, ReportContent(table, title, made, goal, options.test, refresh, options.top))
    with writing(to.path):
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        for path in outdated(to, files):
            path.unlink(missing_ok=True)
    _print_table(table, options, console)
    written = list(files) if to.is_file or options.format is not None else [to.path / name for name in _NAMED]
    console.print(*map(layout.short_path, written), sep="\n", markup=False, soft_wrap=True)
    return state


# -- the printed table


def _print_table(table: Table, options: _Options, console: Console) -> None:
    """Prints the leaderboard; on a terminal hides columns until it fits, the least important ones first."""
    dropped = _unfitting(table, options, console) if console.is_terminal else []
    grids = [_grid(table, options, dropped)]
    if published := against_published(table):
        grids.append(_published_grid(published[: options.top], table))
    if not console.is_terminal:
        unlimited = console.options.update(width=1000)
        console.width = max(console.measure(grid, options=unlimited).maximum for grid in grids)
    for grid in grids:
        console.print(FittedTable(grid))
    for line in _hidden(table, dropped):
        console.print(Text(printable(line)), soft_wrap=not console.is_terminal)
    for line in _notes(table, options):
        console.print(Text(printable(line)), soft_wrap=True)


def _unfitting(table: Table, options: _Options, console: Console) -> list[str]:
    """Returns the columns to hide; none if the terminal is too narrow for any table, which then becomes a list."""
    expendable = ["steps", "val_loss", "seconds", *([] if options.test else ["test"])]
    candidates = [expendable[:count] for count in range(len(expendable) + 1)]
    fitted = [(dropped, FittedTable(_grid(table, options, dropped))) for dropped in candidates]
    for dropped, grid in fitted:
        if grid.fits(console, console.width):
            return dropped
    return expendable if fitted[-1][1].fits(console, console.width, folded=True) else []


def _grid(table: Table, options: _Options, dropped: Collection[str]) -> Grid:
    metrics = [name for name in _metrics(table) if name == table.by or name not in dropped]
    tests = [] if "test" in dropped else test_columns(table)[:1]
    keys = list(table.keys)[:_MAX_KEYS]
    compared = any(row.difference is not None for row in table.rows)
    grid = plain_table(right=["#"])
    for key in keys:
        grid.add_column(Text(printable(short_key(key, table.keys))), overflow="fold")
    grid.add_column("runs", justify="right")
    for name in (*metrics, *tests):
        grid.add_column(name.replace("_", " "), justify="right")
    if compared:
        grid.add_column(Text("vs. best [95 % CI]"), justify="right")
    for rank, row in enumerate(table.rows[: options.top], 1):
        cells = [printable(brief(row.values[key])) if key in row.values else "-" for key in keys]
        values = [_statistic(name, row.statistic(name)) for name in metrics]
        values += [_statistic(name, row.statistic(name)) if options.test or rank == 1 else "" for name in tests]
        difference = [_difference(table.by, row.difference).replace(" %", "")] if compared else []  # percentage points
        style = "bold" if rank == 1 and row.value is not None else ""
        grid.add_row(str(rank), *map(Text, cells), row.count(table.by), *values, *map(Text, difference), style=style)
    return grid


def _metrics(table: Table) -> list[str]:
    return [name for name in columns(table) if name in (table.by, "val_loss", "seconds", "steps")]


def _hidden(table: Table, dropped: Collection[str]) -> list[str]:
    """Names what the printed table leaves out, and gives the test metric of the best row if its column is hidden."""
    lines = []
    if "test" in dropped and table.rows:
        values = [(name, table.rows[0].statistic(name)) for name in test_columns(table)[:1]]
        lines += [f"{name.replace('_', ' ')} of the best: {_statistic(name, value)}" for name, value in values if value]
    names = [*list(table.keys)[_MAX_KEYS:], *(name for name in _metrics(table) if name in dropped and name != table.by)]
    return [*lines, *([f"hidden: {', '.join(names)}; index.html has all columns"] if names else [])]


def _published_grid(rows: Sequence[PublishedRow], table: Table) -> Grid:
    """Returns measured and published test errors in %, the unit of the papers."""
    grid = plain_table(fold=["recipe"], right=["runs", "test error %", "median", "published", "difference"])
    for row in rows:
        error, difference = "-", ""
        median = "" if row.median is None else f"{row.median:.2f}"
        if row.measured is not None:
            error, difference = row.measured.show("{:.2f}".format), f"{row.measured.mean - row.published:+.2f}"
        recipe, count = Text(printable(recipe_label(row, table))), row.row.count("test_accuracy")
        grid.add_row(recipe, count, error, median, f"{row.published:.2f}", difference)
    return grid


def _statistic(name: str, statistic: Statistic | None) -> str:
    if statistic is None:
        return "-"
    if name == "seconds":
        return layout.format_duration(statistic.mean)
    if name == "steps":
        return f"{statistic.mean:,.0f}"
    return statistic.show(partial(layout.format_metric, name)).replace(" % ±", " ±")


def _notes(table: Table, options: _Options) -> list[str]:
    counts = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in table.counts().items())
    rows = layout.format_count("configurations", len(table.rows))
    lines = [f"{rows}, {layout.format_count('runs', len(table.records))}: {counts}"]
    if len(table.rows) > options.top:
        lines[0] += f"; {len(table.rows) - options.top} more rows on the HTML page"
    if table.ranked and (failed := table.ranked[0].failed):
        lines.append(f"#1: {failed} of {len(table.ranked[0].runs)} runs failed; its mean is that of the others")
    best = table.ranked[0].command if table.ranked else None
    lines += [] if best is None else [f"best: {best}"]
    for run in table.failed[:5]:
        killed = "no summary: the process was killed or the machine went down"
        reason = run.reason or (killed if run.status == "unfinished" else "no reason recorded")
        lines.append(f"{run.status}: {layout.short_path(run.path)}: {reason}")
    lines += [f"... and {len(table.failed) - 5} more failed or unfinished runs"] if len(table.failed) > 5 else []
    lines += [f"skipped: {layout.short_path(each.path)}: {each.reason}" for each in table.damaged]
    return lines


# -- results of a sweep: leaderboard or Pareto front


def show_leaderboard(board: Leaderboard, test: str, *, stream: IO[str] | None = None) -> None:
    """Prints the best rows, with their differences to the first.

    Shows the test metric of the first row only: selecting a row by its test metric would be model selection on the test
    set.
    """
    rows = [row for row in board.rows if row.value is not None]
    if not rows:
        return
    is_paired = any(row.difference is not None and row.difference.low is not None for row in rows)
    metric, better = board.metric.replace("_", " "), "higher" if board.direction == "maximize" else "lower"
    table = plain_table(f"{metric} ({better} is better)", left=[""], fold=["configuration"])
    table.add_column("mean ± std" if is_paired else metric, justify="right", no_wrap=True)
    table.add_column("runs", justify="right")
    if is_paired:
        table.add_column("vs. best\n(95 % CI)", justify="right", no_wrap=True)
    table.add_column("test", justify="right")
    for rank, row in enumerate(rows[:_MAX_ROWS], 1):
        tested = row.statistic(test) if rank == 1 else None
        cells = [str(rank), layout.round_floats(row.label), _spread(board.metric, row), row.count(board.metric)]
        cells += [_difference(board.metric, row.difference)] if is_paired else []
        table.add_row(*cells, "" if tested is None else layout.format_metric(test, tested.mean))
    _print(table, stream, f"... and {len(rows) - _MAX_ROWS} more\n" if len(rows) > _MAX_ROWS else "")


def _spread(metric: str, row: Row) -> str:
    assert row.value is not None
    return row.value.show(partial(layout.format_metric, metric))


def _difference(metric: str, difference: Difference | None) -> str:
    return "" if difference is None else difference.show(partial(_signed, metric))


def _signed(metric: str, value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{layout.format_metric(metric, abs(value))}"


def show_front(rows: Sequence[tuple[str, Sequence[float]]], metrics: Sequence[str]) -> None:
    """Prints the Pareto front of a multi-objective search, if any job has finished."""
    if not rows:
        return
    table = plain_table("Pareto front", fold=["configuration"], right=[metric.replace("_", " ") for metric in metrics])
    for label, values in rows:
        table.add_row(layout.round_floats(label), *map(layout.format_metric, metrics, values))
    _print(table)


def _print(table: Grid, stream: IO[str] | None = None, more: str = "") -> None:
    output, console, terminal = open_console(stream)
    console.width = console.width if terminal else _WIDTH
    with console.capture() as capture:
        console.print(FittedTable(table))
    output.write("\n" + "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()) + more)
    output.flush()
