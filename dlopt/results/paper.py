"""Renders the leaderboard as a table for a paper: LaTeX with booktabs, or Markdown.

A row has the keys that vary, the ranking metric, the test metric (of the first row only unless `test`, because
selecting a row by it would be model selection on the test set) and the paired difference to the first row.
"""

from collections.abc import Sequence
from functools import partial

from dlopt.results import drawing
from dlopt.results.columns import test_columns
from dlopt.results.leaderboard import Statistic
from dlopt.results.plots import key_labels
from dlopt.results.ranking import Ranking
from dlopt.results.reading import brief, printable

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
}  # fmt: skip
_NOTE = "mean ± sample standard deviation over seeds"
_DIFFERENCE_NOTE = "difference to the first row: paired over seeds, with its 95 % confidence interval"


def latex(table: Ranking, *, made: str, test: bool, top: int) -> str:
    """Renders a `tabular` with the rules of booktabs; `made`: a comment on the origin of the numbers."""
    heads, rows = _cells(table, test=test, top=top)
    keys, best = len(table.keys), {row.value.mean for row in table.ranked[:1] if row.value is not None}
    lines = [f"% {line}" for line in (printable(made), *_notes(table, top), r"\usepackage{booktabs}")]
    for row, cells in zip(table.rows, rows, strict=False):
        is_best = row.value is not None and row.value.mean in best
        cells[: keys + 1] = map(escaped, cells[: keys + 1])
        cells[keys + 1 :] = [number_cell(cell, is_bold=is_best and i == 0) for i, cell in enumerate(cells[keys + 1 :])]
    return "\n".join([*lines, *tabular(heads, rows, texts=keys), ""])


def tabular(heads: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> list[str]:
    """Returns the lines of a `tabular`; `rows` are LaTeX, and the first `texts` columns aligned to the left."""
    lines = [rf"\begin{{tabular}}{{{'l' * texts}{'r' * (len(heads) - texts)}}}", r"\toprule"]
    lines += [" & ".join(map(escaped, heads)) + r" \\", r"\midrule"]
    return [*lines, *(" & ".join(row) + r" \\" for row in rows), r"\bottomrule", r"\end{tabular}"]


def markdown(table: Ranking, *, made: str, test: bool, top: int) -> str:
    """Renders a Markdown table, with notes below it."""
    heads, rows = _cells(table, test=test, top=top)
    keys = len(table.keys)
    rule = [*["---"] * keys, *["---:"] * (len(heads) - keys)]
    body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in (heads, rule, *rows)]
    return "\n".join([*body, "", f"{'; '.join([*_notes(table, top), printable(made)])}.", ""])


def _notes(table: Ranking, top: int) -> list[str]:
    notes = [_NOTE] * any(len(row.runs) > 1 for row in table.rows)
    notes += [_DIFFERENCE_NOTE] * _is_compared(table)
    counts = [row.count(table.by) for row in table.rows[:top]]
    notes += ["1 of 3 runs: the metrics are those of one"] * any(" of " in count for count in counts)
    return notes + [f"the first {top} of {len(table.rows)} configurations"] * (len(table.rows) > top)


def _is_compared(table: Ranking) -> bool:
    return any(row.difference is not None for row in table.rows)


def _cells(table: Ranking, *, test: bool, top: int) -> tuple[list[str], list[list[str]]]:
    """Returns the headers and the rows: the keys as text, then numbers."""
    metrics = [table.by, *test_columns(table)[:1]]
    heads = [*key_labels(table.keys), "runs", *(drawing.metric_label(name) + _unit(name) for name in metrics)]
    heads += ["difference" + " [points]" * bool(_unit(table.by))] * _is_compared(table)
    rows = []
    for number, row in enumerate(table.rows[:top]):
        cells = [brief(row.values[key]) if key in row.values else "-" for key in table.keys]
        cells += [row.count(table.by), _statistic(table.by, row.value)]
        cells += [_statistic(name, row.statistic(name)) if test or number == 0 else "" for name in metrics[1:]]
        difference = "" if row.difference is None else row.difference.show(partial(_number, table.by, sign="+"))
        cells += [difference] * _is_compared(table)
        rows.append(list(map(printable, cells)))
    return list(map(printable, heads)), rows


def _unit(metric: str) -> str:
    return " [%]" if "accuracy" in metric else ""


def _number(metric: str, value: float, sign: str = "") -> str:
    if "accuracy" in metric:
        return f"{100 * value:{sign}.2f}"
    return f"{value:{sign}.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:{sign}.3e}"


def _statistic(metric: str, statistic: Statistic | None) -> str:
    return "-" if statistic is None else statistic.show(partial(_number, metric))


def escaped(text: str) -> str:
    """Escapes LaTeX's special characters; a bracket after a line's end would be read as its optional argument."""
    return "{}" * text.startswith("[") + "".join(_SPECIAL.get(character, character) for character in printable(text))


def number_cell(cell: str, *, is_bold: bool) -> str:
    """Converts 0.83 ± 0.02 or 0.83 [0.71, 0.90] to LaTeX."""
    if not any(character.isdigit() for character in cell):
        return cell.replace("-", "--")
    inner = cell.replace("±", r"\pm").replace(" [", r"\ [").replace(", ", r",\ ")
    return rf"$\mathbf{{{inner}}}$" if is_bold else f"${inner}$"
