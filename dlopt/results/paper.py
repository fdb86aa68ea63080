"""Renders the leaderboard as a table for a paper: LaTeX with booktabs, or Markdown.

A row has the keys that vary, the ranking metric, the test metric (of the first row only unless `test`, because
selecting a row by it would be model selection on the test set) and the paired difference to the first row.
"""

import textwrap

from dlopt.basics.formats import brief, printable
from dlopt.metrics.shown import is_percent
from dlopt.results import drawing
from dlopt.results.columns import difference_text, statistic_text, test_columns
from dlopt.results.intervals import Statistic
from dlopt.results.plots import key_labels
from dlopt.results.ranking import Ranking
from dlopt.results.remarks import lines, mark
from dlopt.results.tables import Bold, Table, escaped

_LINE = 80  # characters of a remark below a table in LaTeX
_NOTE = "mean ± sample standard deviation over {}"
_DIFFERENCE_NOTE = "vs. best: difference to the first row, paired over {}, with 95 % intervals for the whole table"


def latex(ranking: Ranking, *, made: str, test: bool, top: int) -> str:
    """Renders a `tabular` with the rules of booktabs; `made`: a comment on the origin of the numbers.

    Its last rows are the remarks, in lines of a page's width.
    """
    comments = [f"% {line}" for line in (printable(made), *_notes(ranking, top), r"\usepackage{booktabs}")]
    table = _table(ranking, test=test, top=top)
    *body, end = table.latex()
    for remark in lines(ranking.remarks, top):
        for line in textwrap.wrap(printable(remark), _LINE):
            body.append(rf"\multicolumn{{{len(table.heads)}}}{{l}}{{\footnotesize {escaped(line)}}} \\")
    return "\n".join([*comments, *body, end, ""])


def markdown(ranking: Ranking, *, made: str, test: bool, top: int) -> str:
    """Renders a Markdown table, with the remarks and notes below it."""
    table = _table(ranking, test=test, top=top).markdown()
    listed = [f"- {printable(line)}" for line in lines(ranking.remarks, top)]
    notes = f"{'; '.join([*_notes(ranking, top), printable(made)])}."
    return "\n".join([*table, "", *listed, *[""] * bool(listed), notes, ""])


def _notes(ranking: Ranking, top: int) -> list[str]:
    blocks = ranking.board.blocks
    notes = [_NOTE.format(blocks)] * any(len(row.runs) > 1 for row in ranking.rows)
    notes += [_DIFFERENCE_NOTE.format(blocks)] * _is_compared(ranking)
    counts = [row.count_with_failed(ranking.by) for row in ranking.rows[:top]]
    notes += ["1 of 3 runs: the metrics are those of one"] * any(" of " in count for count in counts)
    notes += [ranking.verdict] * bool(ranking.verdict)
    return notes + [f"the first {top} of {len(ranking.rows)} configurations"] * (len(ranking.rows) > top)


def _is_compared(ranking: Ranking) -> bool:
    return any(row.difference is not None for row in ranking.rows)


def _table(ranking: Ranking, *, test: bool, top: int) -> Table:
    """Returns the keys as text, then numbers; the best values of the ranking metric are bold."""
    metrics = [ranking.by, *test_columns(ranking)[:1]]
    marks = [mark(ranking.remarks, rank) for rank in range(1, len(ranking.rows[:top]) + 1)]
    is_marked = any(marks)
    heads = [*key_labels(ranking.keys), *[""] * is_marked, "runs"]
    heads += [drawing.metric_label(name) + _unit(name) for name in metrics]
    heads += ["vs. best" + " (points)" * bool(_unit(ranking.by))] * _is_compared(ranking)
    best = {row.value.mean for row in ranking.ranked[:1] if row.value is not None}
    rows = []
    for number, row in enumerate(ranking.rows[:top]):
        value = _statistic(ranking.by, row.value)
        cells = [brief(row.values[key]) if key in row.values else "-" for key in ranking.keys]
        cells += [marks[number]] * is_marked
        cells.append(row.count_with_failed(ranking.by))
        cells.append(Bold(value) if row.value is not None and row.value.mean in best else value)
        cells += [_statistic(name, row.statistic(name)) if test or row.is_first else "" for name in metrics[1:]]
        cells += [difference_text(ranking.by, row.difference)] * _is_compared(ranking)
        rows.append(cells)
    return Table(heads, rows, texts=len(ranking.keys) + is_marked)


def _unit(metric: str) -> str:
    return " (%)" if is_percent(metric) else ""


def _statistic(metric: str, statistic: Statistic | None) -> str:
    """Formats a statistic without its unit, which the head of the column has."""
    return statistic_text(metric, statistic).removesuffix(" %")
