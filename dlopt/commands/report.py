"""`dlopt report`: compares runs and sweeps in a table, in pictures and on a page."""

import contextlib
import io
import operator
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from dlopt.analysis.report.page import columns, page, page_data, summary_csv, test_columns
from dlopt.analysis.report.reading import Damaged, Reader, Record, brief, printable
from dlopt.analysis.report.table import (
    Configuration,
    PublishedRow,
    Table,
    against_published,
    default_target,
    gather,
    recipe_label,
    short_key,
)
from dlopt.commands.command import check_own, writing
from dlopt.commands.runs import split_folders
from dlopt.config.saved import typed_values
from dlopt.errors import DONE, UserError
from dlopt.files import write_atomically
from dlopt.interruption import Interruption
from dlopt.ranges import Count
from dlopt.tracking import layout
from dlopt.tracking.console import open_console
from dlopt.tracking.layout import Fitted, plain_table

if TYPE_CHECKING:
    from dlopt.analysis.leaderboard import Leaderboard, Row, Statistic

USAGE = """\
dlopt report DIR... [key=value] [--watch] [--open]

Compares the runs and sweeps in and below the folders: a table here, and in DIR/report/ a page (index.html, which needs
no network), summary.csv and pictures. Runs that differ in their seeds only are one configuration.

  dlopt report outputs/night
  dlopt report outputs/night by=val_loss target=0.4
  dlopt report outputs/night --watch --open       while the sweep runs

  by=METRIC     the validation metric that ranks (val_accuracy; val_loss where there is none)
  target=N      the metric whose time is taken (one that half of the configurations reach); accuracies as 0..1
  test=true     the test metrics of all rows, not of the first alone
  top=N         rows of the table here (20)
  output=DIR    instead of DIR/report (of the first DIR)
  --watch       goes on until stopped, and writes anew whenever a run has written
  --open        shows the page in the browser, served on this machine's loopback address until stopped
"""

_EVERY = 5.0  # seconds between two looks at the folders
_KEYS_HERE = 6  # of the config, in a table at a terminal
_ROWS = 12  # of a sweep's leaderboard
_WIDTH = 130  # columns of a sweep's leaderboard in a file


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The keys of this command."""

    by: str | None = None
    target: float | None = None
    test: bool = False
    top: Count = 20
    output: str | None = None


def report(arguments: list[str]) -> int:
    """Writes, and shows; with `--watch` or `--open` until it is stopped. Raises `UserError`."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return DONE
    folders, flags, others = split_folders(arguments, "report", ("--watch", "--open"))
    for line in others:
        if "=" not in line:
            raise UserError(f"{line}: no such folder")
    options = _Options(**check_own(_Options, typed_values(others)))
    if not folders:
        raise UserError("report: a folder of runs is needed: dlopt report outputs/NAME")
    target = folders[0] / "report" if options.output is None else Path(options.output)
    reader, console = Reader(), Console(highlight=False)
    watch = "--watch" in flags
    seen = _write(reader, folders, target, options, console, watch=watch)
    if not flags:
        return DONE
    with contextlib.ExitStack() as stack:
        if "--open" in flags:
            from dlopt.analysis.report.page import serve

            address = stack.enter_context(serve(target))
            print(f"{address}  (Ctrl+C ends)", flush=True)
            _open_browser(address)
        # A flag: libraries that draw and rank may swallow a KeyboardInterrupt.
        with Interruption() as stop, contextlib.suppress(KeyboardInterrupt):
            while not _waited(stop, _EVERY):
                if watch:
                    seen = _write(reader, folders, target, options, console, watch=True, before=seen)
    return DONE


def _waited(stop: Interruption, seconds: float) -> bool:
    """Waits for so long, or until `stop` is true; returns `stop`."""
    until = time.monotonic() + seconds
    while not stop and time.monotonic() < until:
        time.sleep(0.1)
    return bool(stop)


def _write(
    reader: Reader,
    folders: Sequence[Path],
    target: Path,
    options: _Options,
    console: Console,
    *,
    watch: bool,
    before: "Sequence[Record | Damaged] | None" = None,
) -> "Sequence[Record | Damaged]":
    """Reads and writes everything, unless all is as it was `before`. Returns how it was."""
    records, damaged = reader.read(folders)
    if not records and not watch:
        broken = (
            f"; {len(damaged)} damaged: {layout.short_path(damaged[0].path)}: {damaged[0].reason}" if damaged else ""
        )
        raise UserError(f"{' '.join(map(str, folders))}: there is no run in or below{broken}")
    state: list[Record | Damaged] = [*records, *damaged]
    if before is not None and len(before) == len(state) and all(map(operator.is_, before, state)):
        return before
    table = gather(records, damaged, options.by)
    goal = default_target(table) if options.target is None else options.target
    title = "Runs in " + ", ".join(layout.short_path(folder) for folder in folders)
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    data = page_data(table, title=title, made=made, target=goal, test=options.test, refresh=_EVERY if watch else None)
    files = _pictures(table, goal)
    files |= {"summary.csv": summary_csv(table, goal, test=options.test).encode(), "index.html": page(data).encode()}
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(target / name, content)
    _show(table, options, console)
    written = [layout.short_path(target / name) for name in ("index.html", "summary.csv")]
    console.print(*written, sep="\n", markup=False, soft_wrap=True)
    return state


def _pictures(table: Table, target: float | None) -> dict[str, bytes]:
    from dlopt.analysis.report.pictures import pictures

    found = {}
    for name, figure in pictures(table, target).items():
        file = io.BytesIO()
        figure.savefig(file, dpi=150, format="png")
        found[name] = file.getvalue()
    return found


def _open_browser(address: str) -> None:
    import webbrowser

    with contextlib.suppress(webbrowser.Error):
        webbrowser.open(address)


# -- the table at the terminal


def _show(table: Table, options: _Options, console: Console) -> None:
    """Columns that do not fit a terminal are left to the page, the least important first."""
    expendable = ("steps", "val_loss", "seconds", "difference")
    unlimited = console.options.update(width=1000)
    for count in range(len(expendable) + 1) if console.is_terminal else [0]:
        grid = _grid(table, options, expendable[:count])
        width = console.measure(grid, options=unlimited).maximum
        if width <= console.width:
            break
    else:
        grid = _grid(table, options, ())  # as a record for each row, which has room for all
    grids = [grid]
    if found := against_published(table):
        grids.append(_published_grid(found[: options.top], table))
    if not console.is_terminal:
        console.width = max(console.measure(each, options=unlimited).maximum for each in grids)
    for each in grids:
        console.print(Fitted(each))
    for line in _notes(table, options):
        console.print(Text(printable(line)), soft_wrap=True)


def _grid(table: Table, options: _Options, dropped: Collection[str]) -> Grid:
    metrics = [name for name in columns(table) if name in (table.by, "val_loss", "seconds", "steps")]
    metrics = [name for name in metrics if name == table.by or name not in dropped]
    tests = test_columns(table)[:1]
    keys = list(table.keys)[:_KEYS_HERE]
    compared = "difference" not in dropped and any(row.difference is not None for row in table.rows)
    grid = plain_table()
    grid.add_column("#", justify="right")
    for key in keys:
        grid.add_column(Text(printable(short_key(key, table.keys))), overflow="fold")
    grid.add_column("runs", justify="right")
    for name in (*metrics, *tests):
        grid.add_column(name.replace("_", " "), justify="right")
    if compared:
        grid.add_column(Text("to the first [95 %]"), justify="right")
    for rank, row in enumerate(table.rows[: options.top], 1):
        cells = [printable(brief(row.values[key])) if key in row.values else "-" for key in keys]
        shown = [_statistic(name, row.statistic(name)) for name in metrics]
        shown += [_statistic(name, row.statistic(name)) if options.test or rank == 1 else "" for name in tests]
        gap = [_difference(table.by, row)] if compared else []
        style = "bold" if rank == 1 and row.value is not None else ""
        grid.add_row(str(rank), *map(Text, cells), _runs(row), *shown, *map(Text, gap), style=style)
    return grid


def _published_grid(found: Sequence[PublishedRow], table: Table) -> Grid:
    """Errors, as papers give them."""
    grid = plain_table()
    grid.add_column("recipe", overflow="fold")
    for name in ("runs", "test error %", "published", "difference"):
        grid.add_column(name, justify="right")
    for each in found:
        error, gap = "-", ""
        if each.measured is not None:
            deviation = "" if each.measured.std is None else f" ± {each.measured.std:.2f}"
            error, gap = f"{each.measured.mean:.2f}{deviation}", f"{each.measured.mean - each.published:+.2f}"
        grid.add_row(Text(printable(recipe_label(each, table))), _runs(each.row), error, f"{each.published:.2f}", gap)
    return grid


def _runs(row: Configuration) -> str:
    ended = sum(run.has_ended for run in row.row.runs)
    return str(len(row.runs)) if ended == len(row.runs) else f"{ended}/{len(row.runs)}"


def _statistic(name: str, found: "Statistic | None") -> str:
    if found is None:
        return "-"
    if name == "seconds":
        return layout.duration(found.mean)
    mean = layout.metric(name, found.mean)
    if name == "steps":
        return f"{found.mean:,.0f}"
    return mean if found.std is None else f"{mean.removesuffix(' %')} ± {layout.metric(name, found.std)}"


def _difference(name: str, row: Configuration) -> str:
    gap = row.difference
    if gap is None:
        return ""
    scale, digits = (100, 2) if "accuracy" in name else (1, 4)
    bounds = (
        ""
        if gap.low is None or gap.high is None
        else f" [{scale * gap.low:+.{digits}f}, {scale * gap.high:+.{digits}f}]"
    )
    return f"{scale * gap.mean:+.{digits}f}{bounds}"


def _notes(table: Table, options: _Options) -> list[str]:
    counts = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in table.counts().items())
    lines = [f"{len(table.rows)} configurations, {len(table.records)} runs: {counts}"]
    if len(table.rows) > options.top:
        lines[0] += f"; {len(table.rows) - options.top} more rows on the page"
    best = table.ranked[0].command if table.ranked else None
    lines += [] if best is None else [f"the first: {best}"]
    lines += [f"failed: {layout.short_path(run.path)}: {run.reason or run.status}" for run in table.failed[:5]]
    lines += [f"... and {len(table.failed) - 5} more failed runs"] if len(table.failed) > 5 else []
    lines += [f"skipped: {layout.short_path(each.path)}: {each.reason}" for each in table.damaged]
    return lines


# -- what a sweep ends with: its leaderboard, or the jobs of which none is better in everything


def show_leaderboard(
    board: "Leaderboard", test: str, *, all_tests: bool = False, stream: IO[str] | None = None
) -> None:
    """Prints the best rows, with the difference of the others to the first.

    The test metric is that of the first only, unless `all_tests`: whoever looks at all of them and picks one has chosen
    on the test set.
    """
    rows = [row for row in board.rows if row.value is not None]
    if not rows:
        return
    is_paired = any(row.difference is not None and row.difference.low is not None for row in rows)
    title = (
        f"{board.metric.replace('_', ' ')}, {'the higher' if board.direction == 'maximize' else 'the lower'} the better"
    )
    table = plain_table(title)
    table.add_column("")
    table.add_column("configuration", overflow="fold")
    table.add_column("mean ± deviation" if is_paired else board.metric.replace("_", " "), justify="right", no_wrap=True)
    table.add_column("runs", justify="right")
    if is_paired:
        table.add_column("difference to the first\n(95 % confidence)", justify="right", no_wrap=True)
    table.add_column("test", justify="right")
    for place, row in enumerate(rows[:_ROWS], 1):
        tested = row.statistic(test) if place == 1 or all_tests else None
        cells = [str(place), row.label, _spread(board.metric, row), _complete(row)]
        cells += [_gap(board.metric, row)] if is_paired else []
        table.add_row(*cells, "" if tested is None else layout.metric(test, tested.mean))
    _print(table, stream, f"... and {len(rows) - _ROWS} more\n" if len(rows) > _ROWS else "")


def _spread(metric: str, row: "Row") -> str:
    assert row.value is not None
    mean = layout.metric(metric, row.value.mean)
    return mean if row.value.std is None else f"{mean} ± {layout.metric(metric, row.value.std)}"


def _complete(row: "Row") -> str:
    count = 0 if row.value is None else row.value.count
    return str(count) if count == len(row.runs) else f"{count} of {len(row.runs)}"


def _gap(metric: str, row: "Row") -> str:
    found = row.difference
    if found is None:
        return ""
    mean = _signed(metric, found.mean)
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{_signed(metric, found.low)}, {_signed(metric, found.high)}]"


def _signed(metric: str, value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{layout.metric(metric, abs(value))}"


def show_front(rows: Sequence[tuple[str, Sequence[float]]], metrics: Sequence[str]) -> None:
    """What no other job beats in every objective."""
    table = plain_table("no other job is better in all of these")
    table.add_column("configuration", overflow="fold")
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for label, values in rows:
        table.add_row(label, *(layout.metric(metric, value) for metric, value in zip(metrics, values, strict=True)))
    _print(table)


def _print(table: Grid, stream: IO[str] | None = None, more: str = "") -> None:
    output, console, terminal = open_console(stream)
    console.width = console.width if terminal else _WIDTH
    with console.capture() as capture:
        console.print(Fitted(table))
    output.write("\n" + "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()) + more)
    output.flush()
