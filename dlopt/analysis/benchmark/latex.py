"""Renders the results of a benchmark as LaTeX tables with booktabs: the scores, and the updates to the targets."""

from dlopt.analysis.benchmark import formats
from dlopt.analysis.benchmark.results import Results
from dlopt.analysis.benchmark.scores import Summary
from dlopt.analysis.report.paper import escaped, number_cell, tabular
from dlopt.analysis.report.reading import printable


def latex(results: Results, summary: Summary) -> str:
    """Returns two `tabular`s. The highest scores, and the fewest updates of each workload, are bold."""
    lines = [  # printable: without line breaks, which would end a comment
        f"% dlopt benchmark, tier {printable(results.tier)}, {results.studies} studies of {results.trials} trials",
        f"% {printable(str(results.facts.get('command', '')))}",
        r"% \usepackage{booktabs}",
        "% scores in updates and time: integral of the performance profile over tau in [1, 4], with its 95 % interval",
        "% targets and trials: reached; cost: time per update relative to SGD; state: memory / parameters",
        *_scores(results, summary),
        "",
        "% median over studies of the updates to the target; --: not reached",
        *_updates(results, summary),
    ]
    return "\n".join([*lines, ""])


def _scores(results: Results, summary: Summary) -> list[str]:
    rows = []
    for standing in summary.standings["updates"]:
        name, others = standing.optimizer, formats.standing(standing, len(results.workloads))
        scores = [
            number_cell(formats.interval(summary.score(name, measure)), is_bold=summary.is_best(name, measure))
            for measure in summary.measures
        ]
        rows.append([escaped(name), *scores, *map(_plain, others)])
    return tabular(["optimizer", *summary.measures, "targets", "trials", "cost", "state"], rows)


def _updates(results: Results, summary: Summary) -> list[str]:
    table = summary.times["updates"]
    best = {workload: min(row[workload] for row in table.values()) for workload in results.workloads}
    rows = []
    for optimizer in summary.order:
        cells = []
        for workload, value in table[optimizer].items():
            text = _plain(formats.updates(value))
            cells.append(rf"\textbf{{{text}}}" if value == best[workload] and text != "--" else text)
        rows.append([escaped(optimizer), *cells])
    return tabular(["optimizer", *results.workloads], rows)


def _plain(text: str) -> str:
    return "--" if text == formats.NONE else text.replace(" %", r"\,\%")
