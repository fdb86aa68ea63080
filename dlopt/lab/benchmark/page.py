"""Writes the results of a benchmark as a self-contained HTML page, with its figures and a LaTeX table."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dlopt._version import __version__
from dlopt.extend import printable
from dlopt.lab import report
from dlopt.lab.benchmark import agreement, formats, tuning
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
    """Writes index.html, table.tex and figures/NAME.png and .pdf; returns their paths. Raises OSError."""
    summary = summarize(results) if results.optimizers else None
    figures = {} if summary is None else draw(results, summary)
    pictures = {name: report.picture(figure) for name, figure in figures.items()}
    texts = {"index.html": page(results, summary, pictures)}
    if summary is not None:
        texts["table.tex"] = latex(results, summary)
    return report.write(folder, texts, figures, ("png", "pdf"))


def page(results: Results, summary: Summary | None, pictures: Mapping[str, Mapping[str, Any]]) -> str:
    """Renders the page; `pictures`: `source` and `width` by the figure's name; figures without data are missing."""
    folder = Path(__file__).parent
    tables = {} if summary is None else _tables(results, summary)
    return render(
        "page.html", folder,
        title=f"Optimizer benchmark, {results.tier} tier", version=__version__,
        style=report.style(), script=Markup(Path(__file__).with_name("sort.js").read_text(encoding="utf-8")),
        results=results, summary=summary, workloads=list(results.workloads), pictures=pictures,
        max_ratio=round(MAX_RATIO), self_tuning_length=SELF_TUNING_LENGTH, resamples=RESAMPLES, per_try=tuning.PER_TRY,
        fact=_fact, **tables,
    )  # fmt: skip


# -- the tables: a row per optimizer, in the order of the score in updates


def _tables(results: Results, summary: Summary) -> dict[str, Any]:
    missing = {
        optimizer: [name for name in results.workloads if not results.cell(optimizer, name).records]
        for optimizer in summary.order
    }
    tested = [name for name in results.workloads if any(results.cell(each, name).tests for each in summary.order)]
    spaces = {optimizer: results.spaces.get(optimizer, {}) for optimizer in summary.order}
    tuned = tuning.tuning(results)
    agreed = agreement.agreements(results)
    return {
        "user_facts": {key: value for key, value in results.facts.items() if key not in ("command", "reference")},
        "missing": [f"{optimizer} ({', '.join(names)})" for optimizer, names in missing.items() if names],
        "compared": [
            [name, drawing.metric_label(each.metric), formats.number(each.target), str(each.updates)]
            for name, each in results.workloads.items()
        ],
        "spaces": [(name, "; ".join(f"{key} {value}" for key, value in each.items())) for name, each in spaces.items()],
        "heads": {measure: _HEADS[measure] for measure in summary.measures},
        "scores": _scores(results, summary),
        "findings": findings(results, summary),
        "updates": _updates(results, summary),
        "agreement_heads": agreement.HEADS,
        "agreement": agreement.rows(agreed),
        "agreement_findings": agreement.texts(results, agreed, "findings"),
        "agreement_note": " ".join(agreement.texts(results, agreed, "note")),
        "agreement_sources": agreement.texts(results, agreed, "sources"),
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
    }  # fmt: skip


def _small(text: str) -> Markup:
    return Markup("<small>{}</small>").format(text)


def _lines(parts: Iterable[str]) -> str:
    return Markup("<br>").join(map(printable, parts)) or formats.NONE


def _name(results: Results, optimizer: str) -> str:
    if optimizer in results.shipped:
        return Markup("{} {}").format(printable(optimizer), _small("shipped"))
    return Bold(optimizer) if results.shipped else optimizer


def _scores(results: Results, summary: Summary) -> Rows:
    rows = zip(summary.standings["updates"], score_rows(results, summary, partial(_name, results)), strict=True)
    return [[*row[:-2], formats.percent(standing.failed), *row[-2:]] for standing, row in rows]


def _updates(results: Results, summary: Summary) -> Rows:
    """Returns the updates to the targets, with the ranks on each workload."""
    ranked = [ranks(summary.times["updates"], workload) for workload in results.workloads]

    def cell(text: str, rank: float | None) -> str:
        pattern = Markup("<b>{}</b>{}") if isinstance(text, Bold) else Markup("{}{}")
        return text if rank is None else pattern.format(text, _small(f" ({rank:g})"))

    rows = zip(summary.order, update_rows(results, summary, partial(_name, results)), strict=True)
    return [[first, *map(cell, cells, [each[name] for each in ranked])] for name, (first, *cells) in rows]


def _hyperparameters(results: Results, summary: Summary) -> Rows:
    rows = []
    for optimizer in summary.order:
        best = [
            best_trial(results.cell(optimizer, name).records, spec.metric) for name, spec in results.workloads.items()
        ]
        keys = [*dict.fromkeys(key for record in best if record for key in record.values)]
        columns = [[formats.drawn_value(record.values.get(key)) for key in keys] if record else [] for record in best]
        short = [short_key(key, keys) for key in keys]
        rows.append([_name(results, optimizer), _lines(short), *map(_lines, columns)])
    return rows


def _costs(results: Results, summary: Summary) -> Rows:
    rows = []
    for optimizer in summary.order:
        costs = [results.cell(optimizer, workload).cost for workload in results.workloads]
        cells = [
            formats.NONE if cost is None
            else Markup("{:.2f}<br>{}").format(cost.time, _small(f"{cost.low:.2f}–{cost.high:.2f}"))
            for cost in costs
        ]  # fmt: skip
        standing = summary.standing(optimizer)
        together = [formats.number(standing.cost, ".2f"), formats.number(standing.state, ".1f")]
        rows.append([_name(results, optimizer), *cells, *together])
    return rows


def _tests(results: Results, summary: Summary, workloads: Sequence[str]) -> Rows:
    rows = []
    for optimizer in summary.order:
        tested = [results.cell(optimizer, name).tests.values() for name in workloads]
        metrics = [*dict.fromkeys(metric for each in tested for test in each for metric in test)]
        columns = [
            [formats.mean_and_std([test[each] for test in cell if test.get(each) is not None]) for each in metrics]
            for cell in tested
        ]
        labels = [base_name(metric).replace("_", " ") for metric in metrics]
        rows.append([_name(results, optimizer), _lines(labels), *map(_lines, columns)])
    return rows


def _fact(value: Any) -> str:
    """Formats a fact about the results: lists and mappings with commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(each)}" for key, each in value.items())
    return ", ".join(map(_fact, value)) if isinstance(value, list | tuple) else str(value)
