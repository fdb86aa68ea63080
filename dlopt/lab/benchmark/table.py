"""Renders the results of a benchmark for the terminal and as LaTeX: scores, findings, updates to the targets."""

import io
import textwrap
from collections.abc import Mapping

from rich.console import Console

from dlopt.basics.formats import printable
from dlopt.lab.benchmark import formats, tuning
from dlopt.lab.benchmark.findings import findings
from dlopt.lab.benchmark.results import Measure, Results
from dlopt.lab.benchmark.scores import Summary, summarize
from dlopt.results.tables import Bold, Table

WIDTH = 100  # characters; more is hard to read
_NAME = 24  # characters of an optimizer
_SHORT_NAME = 16  # where that leaves room for one table instead of two
_SHORT_OPTIMIZER = 10  # beside a metric
_GAP = 3  # between columns
_SHIPPED = " *"
_HEADS: dict[Measure, str] = {"updates": "score in updates", "evaluations": "evaluations", "time": "time"}


def lines(results: Results, width: int = WIDTH) -> list[str]:
    """Returns the summary, at most `width` characters wide if the names of the optimizers leave room."""
    if not results.optimizers:
        return ["There are no results yet."]
    summary = summarize(results)
    text = [*rendered(_scores(results, summary), width), *_note(results, width), ""]
    for finding in findings(results, summary):
        start = "warning: " if finding.is_warning else ""
        text += textwrap.wrap(start + finding.text, width, subsequent_indent="  ", break_on_hyphens=False)
    for table in _updates(results, summary, width):
        text += ["", *rendered(table, width)]
    return text + _tuning(results, summary, width)


def _tuning(results: Results, summary: Summary, width: int) -> list[str]:
    """Returns the expected best results against the number of trials."""
    found = tuning.tuning(results)
    if not found.budgets:
        return []
    heads = tuning.heads(found)
    rows = [[_name(results, each, _NAME), *map(formats.short_interval, found.scores[each])] for each in summary.order]
    title = "Expected score of the best of N trials (intervals where N is small)"
    tables = [Table(["optimizer", *heads], rows, title=title)]
    if best := tuning.best_results(found, results.workloads, _SHORT_OPTIMIZER):
        shown = [[formats.abbreviated(name, _SHORT_NAME), *cells] for name, *cells in best]
        title = "Best expected metric of the best of N trials (shipped, or with full=true)"
        tables.append(Table(["workload", *heads], shown, title=title))
    text = []
    for table in tables:
        text += ["", *rendered(table, width)]
    for sentence in tuning.sentences(found):
        text += textwrap.wrap(printable(sentence), width, subsequent_indent="  ", break_on_hyphens=False)
    return text


def rendered(table: Table, width: int) -> list[str]:
    """Returns the lines of a table on a terminal of this width."""
    file = io.StringIO()
    Console(file=file, width=width, highlight=False, color_system=None).print(table.grid())
    return file.getvalue().rstrip("\n").split("\n")


def _note(results: Results, width: int) -> list[str]:
    texts = [
        "Score: 1 for the fastest on all workloads, 0 for one that reaches no target"
        + ("." if results.studies == 1 else "; with its 95 % interval over studies."),
        *([formats.SELF_TUNING] if results.track == "self_tuning" else []),
        "Cost: time of an update relative to SGD's.",
        "State: memory relative to the parameters.",
    ]
    if results.shipped:
        texts.append(f"{_SHIPPED.strip()}: shipped with dlopt.")
    return textwrap.wrap(" ".join(texts), width)


def _name(results: Results, optimizer: str, width: int) -> str:
    mark = _SHIPPED if optimizer in results.shipped else ""
    return formats.abbreviated(optimizer, width - len(mark)) + mark


def _scores(results: Results, summary: Summary) -> Table:
    is_wide = "evaluations" in summary.measures
    form = formats.short_interval if is_wide else formats.interval
    scores = [_HEADS[measure] for measure in summary.measures]
    rows = []
    for standing in summary.standings["updates"]:
        cells = [form(summary.score(standing.optimizer, measure)) for measure in summary.measures]
        name = _name(results, standing.optimizer, _SHORT_NAME if is_wide else _NAME)
        rows.append([name, *cells, *formats.standing(standing, len(results.workloads))])
    return Table(["optimizer", *scores, "targets", "trials", "cost", "state"], rows)


def _updates(results: Results, summary: Summary, total: int) -> list[Table]:
    """Returns a table of updates to the target, or several with as many workloads each as fit."""
    columns = {
        workload: [
            formats.abbreviated(workload, _NAME),
            *(formats.updates(summary.times["updates"][optimizer][workload]) for optimizer in summary.order),
        ]
        for workload in results.workloads
    }
    widths = {workload: max(map(len, column)) + _GAP for workload, column in columns.items()}
    longest = max(len(_name(results, optimizer, _NAME)) for optimizer in summary.order)
    room = total - sum(widths.values())  # for the names, if there is only one table
    width = min(longest, room) if room >= _SHORT_NAME else longest
    title = "Updates to the target (median over studies)"
    tables = []
    for workloads in _blocks(widths, total - width):
        heads = ["optimizer", *(columns[workload][0] for workload in workloads)]
        rows = [
            [_name(results, optimizer, width), *(columns[workload][i] for workload in workloads)]
            for i, optimizer in enumerate(summary.order, 1)
        ]
        tables.append(Table(heads, rows, title=title))
    return tables


def _blocks(widths: Mapping[str, int], width: int) -> list[list[str]]:
    """Splits the workloads into blocks of at most `width` characters."""
    blocks: list[list[str]] = [[]]
    used = 0
    for workload, needed in widths.items():
        if blocks[-1] and used + needed > width:
            blocks.append([])
            used = 0
        blocks[-1].append(workload)
        used += needed
    return blocks


# -- LaTeX with booktabs


def latex(results: Results, summary: Summary) -> str:
    """Returns two `tabular`s. The highest scores, and the fewest updates of each workload, are bold."""
    lines = [  # printable: without line breaks, which would end a comment
        f"% dlopt benchmark, tier {printable(results.tier)}, track {results.track}, "
        f"{results.studies} studies of {results.trials} trials",
        f"% {printable(str(results.facts.get('command', '')))}",
        r"% \usepackage{booktabs}",
        "% scores in updates and time: integral of the performance profile over tau in [1, 4], with its 95 % interval",
        "% targets and trials: reached; cost: time per update relative to SGD; state: memory / parameters",
        *_latex_scores(results, summary),
        "",
        "% median over studies of the updates to the target; --: not reached",
        *_latex_updates(results, summary),
    ]
    return "\n".join([*lines, ""])


def _latex_scores(results: Results, summary: Summary) -> list[str]:
    rows = []
    for standing in summary.standings["updates"]:
        cells = [standing.optimizer]
        for measure in summary.measures:
            text = formats.interval(summary.score(standing.optimizer, measure))
            cells.append(Bold(text) if summary.is_best(standing.optimizer, measure) else text)
        rows.append([*cells, *formats.standing(standing, len(results.workloads))])
    return Table(["optimizer", *summary.measures, "targets", "trials", "cost", "state"], rows).latex()


def _latex_updates(results: Results, summary: Summary) -> list[str]:
    times = summary.times["updates"]
    best = {workload: min(row[workload] for row in times.values()) for workload in results.workloads}
    rows = []
    for optimizer in summary.order:
        cells = [optimizer]
        for workload, value in times[optimizer].items():
            text = formats.updates(value)
            cells.append(Bold(text) if value == best[workload] else text)
        rows.append(cells)
    return Table(["optimizer", *results.workloads], rows).latex()
