"""Writes the results of a benchmark as a self-contained HTML page, with its figures and a LaTeX table."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dlopt._version import __version__
from dlopt.extend import printable
from dlopt.lab import report
from dlopt.lab.benchmark import formats, tuning
from dlopt.lab.benchmark.figures import draw
from dlopt.lab.benchmark.findings import findings
from dlopt.lab.benchmark.protocol import SELF_TUNING_LENGTH
from dlopt.lab.benchmark.results import Measure, Results, best_trial
from dlopt.lab.benchmark.scores import MAX_RATIO, RESAMPLES, Summary, ranks, summarize
from dlopt.lab.benchmark.symptoms import RANGE_HEADS, range_rows
from dlopt.lab.benchmark.table import Rows, latex, score_rows, update_rows
from dlopt.metrics.names import base_name
from dlopt.results import drawing
from dlopt.results.page import render
from dlopt.results.reading import short_key
from dlopt.results.tables import Bold

_HEADS: Mapping[Measure, str] = {
    "updates": "Score in updates", "evaluations": "Score in evaluations", "time": "Score in time",
}  # fmt: skip


def write(results: Results, folder: Path) -> list[Path]:
    """Writes index.html, table.tex and figures/NAME.png and .pdf; returns their paths. Raises OSError.

    Without results there is only index.html.
    """
    if not results.optimizers:
        return report.write(folder, {"index.html": page(results, None, {})}, {}, ())
    summary = summarize(results)
    figures = draw(results, summary)
    pictures = {name: report.picture(figure) for name, figure in figures.items()}
    texts = {"index.html": page(results, summary, pictures), "table.tex": latex(results, summary)}
    return report.write(folder, texts, figures, ("png", "pdf"))


def page(results: Results, summary: Summary | None, pictures: Mapping[str, Mapping[str, Any]]) -> str:
    """Renders the page; `pictures`: `source` and `width` by the figure's name; figures without data are missing."""
    folder = Path(__file__).parent
    script = (folder / "sort.js").read_text(encoding="utf-8")
    tables = {} if summary is None else _tables(results, summary)
    return render(
        "page.html", folder,
        title=f"Optimizer benchmark, {results.tier} tier", version=__version__,
        style=report.style(), script=Markup(script),
        results=results, summary=summary, workloads=list(results.workloads), pictures=pictures,
        max_ratio=round(MAX_RATIO), self_tuning_length=SELF_TUNING_LENGTH, resamples=RESAMPLES, per_try=tuning.PER_TRY,
        fact=_fact, **tables,
    )  # fmt: skip


def _fact(value: Any) -> str:
    """Formats a fact about the results: lists and mappings with commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value))
    return str(value)


def _tables(results: Results, summary: Summary) -> dict[str, Any]:
    """Returns the values of page.html that need a summary."""
    tuned = tuning.tuning(results)
    tested = _tested(results)
    return {
        "user_facts": {key: value for key, value in results.facts.items() if key not in ("command", "reference")},
        "missing": _missing(results, summary),
        "compared": _compared(results),
        "spaces": _spaces(results, summary),
        "heads": {measure: _HEADS[measure] for measure in summary.measures},
        "scores": _scores(results, summary),
        "findings": findings(results, summary),
        "updates": _updates(results, summary),
        "hyperparameters": _hyperparameters(results, summary),
        "range_heads": RANGE_HEADS,
        "range_ends": range_rows(results, summary.order),
        "tuning_heads": tuning.heads(tuned),
        "league": tuning.league_rows(tuned, summary.order, partial(_name, results)),
        "tuning_findings": tuning.leaders(tuned),
        "best_results": tuning.best_results(tuned, results.workloads),
        "costs": _costs(results, summary),
        "tested": tested,
        "tests": _tests(results, summary, tested),
    }


# -- what was compared


def _missing(results: Results, summary: Summary) -> list[str]:
    """Returns the optimizers without any trial on a workload, with these workloads."""
    texts = []
    for optimizer in summary.order:
        names = [name for name in results.workloads if not results.cell(optimizer, name).records]
        if names:
            texts.append(f"{optimizer} ({', '.join(names)})")
    return texts


def _compared(results: Results) -> Rows:
    """Returns a row per workload: its metric, target, and updates of a full run."""
    rows = []
    for name, spec in results.workloads.items():
        target = formats.number(spec.target)
        rows.append([name, drawing.metric_label(spec.metric), target, str(spec.updates)])
    return rows


def _spaces(results: Results, summary: Summary) -> list[tuple[str, str]]:
    """Returns the optimizers with their search spaces."""
    spaces = []
    for optimizer in summary.order:
        space = results.spaces.get(optimizer, {})
        spaces.append((optimizer, "; ".join(f"{key} {value}" for key, value in space.items())))
    return spaces


# -- the tables: a row per optimizer, in the order of the score in updates


def _scores(results: Results, summary: Summary) -> Rows:
    """Returns the rows of scores, with the fraction of failed trials before cost and state."""
    rows = []
    plain_rows = score_rows(results, summary, partial(_name, results))
    for standing, row in zip(summary.standings["updates"], plain_rows, strict=True):
        *first, cost, state = row
        rows.append([*first, formats.percent(standing.failed), cost, state])
    return rows


def _updates(results: Results, summary: Summary) -> Rows:
    """Returns the updates to the targets, with the ranks on each workload."""
    ranks_of_workloads = [ranks(summary.times["updates"], workload) for workload in results.workloads]
    rows = []
    plain_rows = update_rows(results, summary, partial(_name, results))
    for optimizer, (name, *updates) in zip(summary.order, plain_rows, strict=True):
        cells = []
        for text, ranked in zip(updates, ranks_of_workloads, strict=True):
            rank = ranked[optimizer]
            cells.append(text if rank is None else _with_rank(text, rank))
        rows.append([name, *cells])
    return rows


def _with_rank(text: str, rank: float) -> Markup:
    pattern = "<b>{}</b>{}" if isinstance(text, Bold) else "{}{}"
    return Markup(pattern).format(text, _small(f" ({rank:g})"))


def _hyperparameters(results: Results, summary: Summary) -> Rows:
    """Returns the hyperparameters of the best trial on each workload: the keys, and a column of values per workload."""
    rows = []
    for optimizer in summary.order:
        trials = [
            best_trial(results.cell(optimizer, name).records, spec.metric) for name, spec in results.workloads.items()
        ]
        keys: list[str] = []
        for trial in trials:
            if trial is not None:
                keys += [key for key in trial.values if key not in keys]
        row = [_name(results, optimizer), _lines(short_key(key, keys) for key in keys)]
        for trial in trials:
            if trial is None:
                row.append(formats.NONE)
            else:
                row.append(_lines(formats.drawn_value(trial.values.get(key)) for key in keys))
        rows.append(row)
    return rows


def _costs(results: Results, summary: Summary) -> Rows:
    """Returns the time of an update on each workload with its quartiles, the mean time, and the state."""
    rows = []
    for optimizer in summary.order:
        row = [_name(results, optimizer)]
        for workload in results.workloads:
            cost = results.cell(optimizer, workload).cost
            if cost is None:
                row.append(formats.NONE)
            else:
                quartiles = _small(f"{cost.low:.2f}–{cost.high:.2f}")
                row.append(Markup("{:.2f}<br>{}").format(cost.time, quartiles))
        standing = summary.standing(optimizer)
        rows.append([*row, formats.number(standing.cost, ".2f"), formats.number(standing.state, ".1f")])
    return rows


def _tested(results: Results) -> list[str]:
    """Returns the workloads on which an optimizer has test metrics."""
    return [name for name in results.workloads if any(results.cell(each, name).tests for each in results.optimizers)]


def _tests(results: Results, summary: Summary, workloads: Sequence[str]) -> Rows:
    """Returns the test metrics: their names, and a column per workload, mean and deviation over the studies."""
    rows = []
    for optimizer in summary.order:
        studies = {workload: results.cell(optimizer, workload).tests.values() for workload in workloads}
        metrics: list[str] = []
        for tests in studies.values():
            for test in tests:
                metrics += [metric for metric in test if metric not in metrics]
        row = [_name(results, optimizer), _lines(base_name(metric).replace("_", " ") for metric in metrics)]
        for tests in studies.values():
            cells = []
            for metric in metrics:
                values = [test[metric] for test in tests if test.get(metric) is not None]
                cells.append(formats.mean_and_std(values))
            row.append(_lines(cells))
        rows.append(row)
    return rows


# -- their cells


def _name(results: Results, optimizer: str) -> str:
    """Formats the name of an optimizer; next to shipped ones, bold for the others."""
    if optimizer in results.shipped:
        return Markup("{} {}").format(printable(optimizer), _small("shipped"))
    return Bold(optimizer) if results.shipped else optimizer


def _small(text: str) -> Markup:
    return Markup("<small>{}</small>").format(text)


def _lines(parts: Iterable[str]) -> str:
    return Markup("<br>").join(map(printable, parts)) or formats.NONE
