"""`dlopt report`: compares runs and sweeps in a table, plots and an HTML page."""

import contextlib
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dlopt.basics.errors import DONE, UserError
from dlopt.basics.folders import short_path
from dlopt.basics.interruption import Interruption
from dlopt.basics.names import Names
from dlopt.basics.ranges import Count
from dlopt.basics.status_line import waiting
from dlopt.commands.completion import folders
from dlopt.commands.runs import parse
from dlopt.commands.shared.command_line import writing
from dlopt.commands.shared.document import print_document
from dlopt.commands.shared.usage import command_keys
from dlopt.config.packages import entries, function
from dlopt.results import reading
from dlopt.results.destination import Destination, Format, destination
from dlopt.results.reading import Condition, Damaged, Record, RunReader

if TYPE_CHECKING:
    from rich.console import Console

USAGE = """\
Compare runs and sweeps: leaderboard, plots, HTML page

Usage: dlopt report DIR... [condition...] [key=value] [--watch] [--open] [--json]

Examples:
  dlopt report outputs/night
  dlopt report outputs/night by=val_loss target=0.4
  dlopt report outputs tags=paper 'optimizer.lr<=0.1'
  dlopt report outputs/night output=paper.pdf     # all plots, one per page
  dlopt report outputs/night output=table.tex     # a table with booktabs
  dlopt report outputs/night format=[pdf,latex]   # a file per plot, and table.tex
  dlopt report outputs/night --watch --open       # live view of a running sweep

Searches the folders recursively for runs, prints a leaderboard, and writes DIR/report/: index.html (works offline),
summary.csv and plots. Runs that differ only in their seeds count as one configuration.

  condition :: only runs that satisfy it, as in `dlopt runs`: KEY=VALUE, KEY!=VALUE, KEY>X, ..., tags=NAME
  {_Options}
"""

complete = folders
_REFRESH = 5.0  # seconds
_NAMED = ("index.html", "summary.csv")  # files of the default report that are named at its end; the plots are beside


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
    json: Annotated[
        bool,
        "--: print the leaderboard as a JSON document; write files only if output, format or plot is set",
        "not with watch or open",
    ] = False


def report(arguments: list[str]) -> int:
    """Writes and prints the report; with `--watch` or `--open` runs until interrupted. Raises `UserError`."""
    from rich.console import Console  # these imports are slow, and the help does not need them

    from dlopt.results.page import serve

    folders, conditions, command_values = parse(arguments, _Options, "report")
    options = _Options(**command_values)
    if not folders:
        raise UserError("report: needs a folder of runs: dlopt report outputs/NAME")
    to = destination(folders[0], options.output, options.format, options.plot)
    if options.open and to.page is None:
        raise UserError("--open: shows the page; needs a folder with html among its formats")
    reader, console = RunReader(), Console(highlight=False)
    state = _update(reader, folders, to, options, console, conditions)
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
            due = time.monotonic() + _REFRESH
            while not stop:
                time.sleep(0.1)
                if options.watch and time.monotonic() > due:
                    state = _update(reader, folders, to, options, console, conditions, before=state)
                    due = time.monotonic() + _REFRESH
    return DONE


def _update(
    reader: RunReader,
    folders: Sequence[Path],
    to: Destination,
    options: _Options,
    console: "Console",
    conditions: Sequence[Condition] = (),
    before: Sequence[Record | Damaged] | None = None,
) -> Sequence[Record | Damaged]:
    """Reads the runs and writes the report, unless the runs are unchanged since `before`. Returns their state."""
    from dlopt.results import documents
    from dlopt.results.exports import ReportContent, write
    from dlopt.results.looks import looks, remember
    from dlopt.results.printing import show_report
    from dlopt.results.ranking import default_target, gather

    with waiting("reading the runs ..."):
        records, damaged = reader.read(folders)
    where = " ".join(condition.line for condition in conditions)
    if not records and not options.watch:
        hint = f" that satisfy {where}" if where else ""
        if damaged:
            hint += f"; {len(damaged)} damaged: {short_path(damaged[0].path)}: {damaged[0].reason}"
        raise UserError(f"{' '.join(map(str, folders))}: contains no runs{hint}")
    state: list[Record | Damaged] = [*records, *damaged]
    if state == before:  # the reader returns the same records
        return state
    keys = Names("key", [key.label for key in command_keys(_Options)], "dlopt report --help")
    records = reading.select(records, conditions, keys)
    if not records and not options.watch:
        raise UserError(f"{' '.join(map(str, folders))}: no run matches {where}")
    is_early = options.watch and not any(record.metrics for record in records)  # `by` cannot be checked yet
    seen = looks(folders, records)
    table = gather(records, damaged, None if is_early else options.by, seen=seen)
    goal = default_target(table) if options.target is None else options.target
    title = "Runs in " + ", ".join(short_path(folder) for folder in folders) + (f": {where}" if where else "")
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    refresh = _REFRESH if options.watch else None
    added = [function(path)(records) for path in entries("dlopt.reports").values()]
    sections = [section for section in added if section is not None]
    report = ReportContent(table, title, made, goal, options.test, refresh, options.top, sections)
    is_writing = not options.json or any(each is not None for each in (options.output, options.format, options.plot))
    with writing(to.path), waiting("drawing the report ..."):
        files = write(to, report) if is_writing else []
    if not any(record.status == "running" for record in records):  # then there is no verdict
        remember(table.board, folders, seen)
    if options.json:
        print_document(documents.report_document(table, goal, files, test=options.test))
        return state
    show_report(report, console)
    written = files if to.is_file or options.format is not None else [to.path / name for name in _NAMED]
    console.print(*map(short_path, written), sep="\n", markup=False, soft_wrap=True)
    return state
