"""Renders the results of a benchmark as LaTeX tables with booktabs: the scores, and the updates to the targets."""

from collections.abc import Sequence

from dlopt.analysis.benchmark import formats
from dlopt.analysis.benchmark.results import Measure, Results
from dlopt.analysis.benchmark.scores import Interval, Summary
from dlopt.analysis.report.paper import escaped
from dlopt.analysis.report.reading import printable

_HEADS: dict[Measure, str] = {"updates": "updates", "evaluations": "evaluations", "time": "time"}


def latex(results: Results, summary: Summary) -> str:
    """Returns two `tabular`s. The highest scores, and the fewest updates of each workload, are bold."""
    lines = [  # printable: without line breaks, which would end a comment
        f"% dlopt benchmark, tier {printable(results.tier)}, {results.studies} studies of {results.trials} trials",
        f"% {printable(str(results.facts.get('command', '')))}",
        r"% \usepackage{booktabs}",
        "% scores in updates and time: integral of the performance profile over tau in [1, 4], with its 95 % interval",
        "% targets and trials: reached; cost: time per update relative to SGD; state: memory / parameters",
    ]
    lines += _tabular(*_scores(results, summary))
    lines += ["", "% median over studies of the updates to the target; --: not reached"]
    lines += _tabular(*_updates(results, summary))
    return "\n".join([*lines, ""])


def _tabular(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a `tabular`; the cells of the first column are text, the others LaTeX already."""
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(escaped, map(printable, heads))) + r" \\", r"\midrule"]
    lines += [" & ".join([escaped(printable(name)), *cells]) + r" \\" for name, *cells in rows]
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _scores(results: Results, summary: Summary) -> tuple[list[str], list[list[str]]]:
    heads = ["optimizer", *(_HEADS[measure] for measure in summary.measures)]
    heads += ["targets", "trials", "cost", "state"]
    best = {measure: max(each.score.value for each in summary.standings[measure]) for measure in summary.measures}
    rows = []
    for standing in summary.standings["updates"]:
        cells = []
        for measure in summary.measures:
            score = summary.standing(standing.optimizer, measure).score
            is_known = measure != "time" or standing.cost is not None
            cells.append(_interval(score, is_bold=score.value == best[measure] > 0) if is_known else "--")
        cells += [f"{standing.reached}/{len(results.workloads)}", rf"{100 * standing.sensitivity:.0f}\,\%"]
        cells += [_plain(formats.number(standing.cost, ".2f")), _plain(formats.number(standing.state, ".1f"))]
        rows.append([standing.optimizer, *cells])
    return heads, rows


def _interval(score: Interval, *, is_bold: bool) -> str:
    text = formats.interval(score)
    inner = text.replace(" [", r"\ [").replace(", ", r",\ ")
    return rf"$\mathbf{{{inner}}}$" if is_bold else f"${inner}$"


def _plain(text: str) -> str:
    return "--" if text == formats.NONE else text


def _updates(results: Results, summary: Summary) -> tuple[list[str], list[list[str]]]:
    table = summary.times["updates"]
    best = {workload: min(row[workload] for row in table.values()) for workload in results.workloads}
    rows = []
    for optimizer in summary.order:
        cells = []
        for workload, value in table[optimizer].items():
            text = _plain(formats.updates(value))
            cells.append(rf"\textbf{{{text}}}" if value == best[workload] and text != "--" else text)
        rows.append([optimizer, *cells])
    return ["optimizer", *results.workloads], rows
