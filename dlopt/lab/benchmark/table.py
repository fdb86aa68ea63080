"""The tables of a benchmark, rendered for the terminal and as LaTeX; page.py and the documentation use their rows."""

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial

from rich.console import Console

from dlopt.basics.formats import format_count
from dlopt.extend import Table, printable
from dlopt.lab.benchmark import formats, tuning
from dlopt.lab.benchmark.findings import findings
from dlopt.lab.benchmark.results import Measure, Results
from dlopt.lab.benchmark.scores import Interval, Summary, summarize
from dlopt.lab.report import WIDTH, rendered, wrapped
from dlopt.results.tables import Bold

_NAME = 24  # characters of an optimizer
_SHORT_NAME = 16  # beside three scores
_SHORTEST_NAME = 10  # beside a metric
_SHIPPED = " *"
_HEADS: dict[Measure, str] = {"updates": "score in updates", "evaluations": "evaluations", "time": "time"}
_STANDING = ("targets", "trials", "cost", "state")  # as formatted by `formats.standing`
Rows = list[list[str]]
Name = Callable[[str], str]
"""Formats the name of an optimizer."""


# -- the rows: an optimizer each, in the order of the score in updates; the best values are bold


def score_rows(
    results: Results, summary: Summary, name: Name = str, form: Callable[[Interval | None], str] = formats.interval
) -> Rows:
    """Returns the scores in all measures, the targets, the trials, the cost and the state."""
    rows = []
    for standing in summary.standings["updates"]:
        scores = {each: form(summary.score(standing.optimizer, each)) for each in summary.measures}
        cells = [Bold(text) if summary.is_best(standing.optimizer, each) else text for each, text in scores.items()]
        rows.append([name(standing.optimizer), *cells, *formats.standing(standing, len(results.workloads))])
    return rows


def update_rows(results: Results, summary: Summary, name: Name = str) -> Rows:
    """Returns the updates to the target of each workload."""
    times = summary.times["updates"]
    best = {workload: min(row[workload] for row in times.values()) for workload in results.workloads}

    def cell(workload: str, value: float) -> str:
        text = formats.updates(value)
        return Bold(text) if value == best[workload] and math.isfinite(value) else text

    return [[name(each), *(cell(*item) for item in times[each].items())] for each in summary.order]


# -- the terminal


def lines(results: Results, width: int = WIDTH) -> list[str]:
    """Returns the summary on a terminal of this width."""
    if not results.optimizers:
        return ["There are no results yet."]

    summary = summarize(results)
    is_wide = "evaluations" in summary.measures
    form = formats.short_interval if is_wide else formats.interval

    def name(optimizer: str, width: int = _SHORT_NAME if is_wide else _NAME) -> str:
        mark = _SHIPPED if optimizer in results.shipped else ""
        return formats.abbreviated(optimizer, width - len(mark)) + mark

    heads = ["optimizer", *(_HEADS[each] for each in summary.measures), *_STANDING]
    text = [*rendered(Table(heads, score_rows(results, summary, name, form)), width), *_note(results, width), ""]
    text += wrapped(findings(results, summary), width)
    heads = ["optimizer", *map(printable, results.workloads)]
    for table in _narrow(heads, update_rows(results, summary, partial(name, width=_SHORT_NAME)), width):
        text += ["", *rendered(table, width)]
    tuned = tuning.tuning(results)
    if tuned.budgets:
        long = partial(name, width=_NAME)
        rows = tuning.league_rows(tuned, summary.order, long, formats.short_interval)
        title = "Expected score of the best of N trials (intervals where N is small)"
        text += ["", *rendered(Table(["optimizer", *tuning.heads(tuned)], rows, title=title), width)]
    if best := tuning.best_results(tuned, results.workloads, _SHORTEST_NAME):
        title = "Best expected metric of the best of N trials (shipped, or with full=true)"
        text += ["", *rendered(Table(["workload", *tuning.heads(tuned)], best, title=title), width)]
    return text + wrapped(tuning.leaders(tuned), width)


def _narrow(heads: Sequence[str], rows: Rows, width: int) -> list[Table]:
    """Returns a table of updates, or two of half the workloads each where it does not fit."""
    table = Table(heads, rows, title="Updates to the target (median over studies)")
    if len(heads) == 2 or table.grid().fits(Console(), width):
        return [table]
    middle = len(heads) // 2 + 1
    left = _narrow(heads[:middle], [row[:middle] for row in rows], width)
    return left + _narrow([heads[0], *heads[middle:]], [[row[0], *row[middle:]] for row in rows], width)


def _note(results: Results, width: int) -> list[str]:
    texts = [
        "Score: 1 for the fastest on all workloads, 0 for one that reaches no target"
        + ("." if results.studies == 1 else "; with its 95 % interval over studies."),
        *([formats.SELF_TUNING] if results.track == "self_tuning" else []),
        "Cost: time of an update relative to SGD's.",
        "State: memory relative to the parameters.",
        *([f"{_SHIPPED.strip()}: shipped with dlopt."] if results.shipped else []),
    ]
    return textwrap.wrap(" ".join(texts), width)


# -- LaTeX with booktabs


def latex(results: Results, summary: Summary) -> str:
    """Returns two `tabular`s. The highest scores, and the fewest updates of each workload, are bold."""
    heads = ["optimizer", *summary.measures, *_STANDING]
    lines = [  # printable: without line breaks, which would end a comment
        f"% dlopt benchmark, tier {printable(results.tier)}, track {results.track}, "
        f"{format_count('studies', results.studies)} of {format_count('trials', results.trials)}",
        f"% {printable(str(results.facts.get('command', '')))}",
        r"% \usepackage{booktabs}",
        "% scores in updates and time: integral of the performance profile over tau in [1, 4], with its 95 % interval",
        "% targets and trials: reached; cost: time per update relative to SGD; state: memory / parameters",
        *Table(heads, score_rows(results, summary)).latex(),
        "",
        "% median over studies of the updates to the target; --: not reached",
        *Table(["optimizer", *results.workloads], update_rows(results, summary)).latex(),
    ]
    return "\n".join([*lines, ""])
