"""The sections of a benchmark's page: texts and tables."""

from collections.abc import Mapping
from typing import Any

from dlopt.lab.benchmark import formats
from dlopt.lab.benchmark.findings import findings
from dlopt.lab.benchmark.markup import Html, definitions, joined, note, section, table, tag
from dlopt.lab.benchmark.results import Measure, Results, best_trial
from dlopt.lab.benchmark.scores import MAX_RATIO, RESAMPLES, Summary, ranks
from dlopt.results import drawing
from dlopt.results.reading import short_key

DESCRIPTIONS: Mapping[str, str] = {
    "scores": "Scores of the optimizers with their intervals",
    "profiles": "Performance profiles: fraction of workloads within a factor tau of the fastest optimizer",
    "wins": "Matrix: fraction of workloads on which the optimizer of the row is faster than that of the column",
    "learning_curves": "Learning curves of the best trials, a panel per workload",
    "sensitivity": "Heat map: percentage of trials that reach the target, by optimizer and workload",
}
_HEADS: Mapping[Measure, str] = {
    "updates": "Score in updates", "evaluations": "Score in evaluations", "time": "Score in time",
}  # fmt: skip
_UNITS: Mapping[Measure, str] = {
    "updates": "Counts the updates to the target. It does not depend on the machine.",
    "evaluations": "Counts the evaluations of the loss and its gradient. Some optimizers need several per update.",
    "time": "Counts the updates, multiplied by the time of an update relative to SGD's, measured on the same machine.",
}
_TARGETS = (
    "A trial measures the updates until the validation metric is as good as the target, which was fixed beforehand "
    "with baseline optimizers. A trial that fails, or ends before, counts as not reached."
)

_PROFILES = (
    "Each curve shows the fraction of the workloads on which the optimizer is at most τ times slower than the fastest. "
    "At τ = 1: how often it is the fastest. At the right end: how many targets it reaches in up to "
    f"{MAX_RATIO:.0f} times the fastest time. The score is the area below the curve."
)
_WINS = (
    "A cell has the fraction of workloads on which the optimizer of the row needs fewer updates than that of the "
    "column, among the workloads whose target at least one of them reaches; a tie counts one half. Below it: the 95 % "
    "interval over studies. Two optimizers are not distinguishable (grey) if it contains one half."
)
_CURVES = (
    "The fastest trial of each optimizer over all studies; if none reaches the target, the one with the best metric. "
    "Dashed: the target. Dot: where it is reached."
)
_OUTSIDE = " Of shipped optimizers, trials outside the budget of these results are not shown."


def body(results: Results, summary: Summary, pictures: Mapping[str, Html]) -> Html:
    """Returns the page's content; `pictures`: by name, those without data are missing."""
    curves = _CURVES + _OUTSIDE * bool(results.shipped)
    parts = [
        compared(results, summary),
        scores(results, summary, pictures),
        _findings(results, summary),
        _pictured("Performance profiles", _PROFILES, pictures.get("profiles")),
        updates(results, summary),
        _pictured("Wins", _WINS, pictures.get("wins")),
        _pictured("Learning curves", curves, pictures.get("learning_curves")),
        sensitivity(results, summary, pictures),
        costs(results, summary),
        tests(results, summary),
        method(),
    ]
    return joined([part for part in parts if part], "\n")


def _pictured(title: str, text: str, picture: Html | None) -> Html:
    return Html("") if picture is None else section(title, note(text), picture)


def _name(results: Results, optimizer: str) -> Html:
    if optimizer in results.shipped:
        return joined([optimizer, " ", tag("small", "shipped")])
    return tag("b", optimizer) if results.shipped else joined([optimizer])


def _lines(parts: list[str]) -> Html:
    return joined(parts, "<br>") if parts else Html(formats.NONE)


# -- what was compared


def compared(results: Results, summary: Summary) -> Html:
    own, shipped = len(summary.order) - len(results.shipped), len(results.shipped)
    text = f"{len(summary.order)} optimizers" if len(summary.order) > 1 else "One optimizer"
    text += f" ({own} measured here, {shipped} shipped with dlopt)" if shipped else ""
    text += (
        f" on {len(results.workloads)} workloads of the tier {results.tier}. The budget per optimizer and workload is "
        f"{results.studies} studies of {results.trials} trials: each trial is a training run with hyperparameters "
        "drawn from the search space, and each study counts its fastest trial."
    )
    rows = [
        [name, drawing.metric_label(each.metric), formats.number(each.target), str(each.updates)]
        for name, each in results.workloads.items()
    ]
    facts = dict(results.facts)
    command, reference = facts.pop("command", None), facts.pop("reference", None)
    searched = [(optimizer, results.spaces.get(optimizer, {})) for optimizer in summary.order]
    spaces = [(optimizer, "; ".join(f"{key} {value}" for key, value in space.items())) for optimizer, space in searched]
    return section(
        "What was compared",
        tag("p", text),
        tag("div", tag("code", _text(command)), class_="command") if command else "",
        _facts(facts),
        _exclusions(results, summary),
        table(["Workload", "Metric", "Target", "Updates of a full run"], rows, texts=2),
        note(_TARGETS),
        tag("details", tag("summary", "Search spaces"), definitions(spaces)),
        tag("details", tag("summary", "Shipped results"), _facts(reference)) if reference else "",
    )


def _facts(facts: Mapping[str, Any]) -> Html:
    return definitions((key.replace("_", " "), _text(value)) for key, value in facts.items())


def _exclusions(results: Results, summary: Summary) -> Html:
    missing = []
    for optimizer in summary.order:
        if names := [name for name in results.workloads if not results.cell(optimizer, name).records]:
            missing.append(f"{optimizer} ({', '.join(names)})")
    text = f"Without any trial, and therefore counted as not reached: {'; '.join(missing)}."
    return note(text) if missing else Html("")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


# -- results


def scores(results: Results, summary: Summary, pictures: Mapping[str, Html]) -> Html:
    heads = ["Optimizer", *(_HEADS[measure] for measure in summary.measures)]
    heads += ["Targets", "Trials", "Failed", "Time per update", "State"]
    rows = []
    for standing in summary.standings["updates"]:
        cells: list[str] = [_name(results, standing.optimizer)]
        for measure in summary.measures:
            text = formats.interval(summary.score(standing.optimizer, measure))
            cells.append(tag("b", text) if summary.is_best(standing.optimizer, measure) else text)
        targets, trials, *costs = formats.standing(standing, len(results.workloads))
        rows.append([*cells, targets, trials, formats.percent(standing.failed), *costs])
    interval = "" if results.studies == 1 else " In brackets: the 95 % interval over studies."
    first, *others = summary.measures
    terms = [
        (_HEADS[first], f"1: the fastest on all workloads; 0: reaches no target. {_UNITS[first]}{interval}"),
        *((_HEADS[measure], _UNITS[measure]) for measure in others),
        ("Targets", "Workloads whose target is reached in the median over studies."),
        ("Trials", "Trials that reach their target, of all workloads: how easy the optimizer is to tune."),
        ("Failed", "Trials that ended with an error; a diverged trial is one."),
        ("Time per update", "Relative to SGD's, geometric mean over workloads."),
        ("State", "Memory of the optimizer's state relative to that of the parameters: 1 for momentum, 2 for Adam."),
    ]
    return section("Scores", table(heads, rows), definitions(terms), pictures["scores"])


def _findings(results: Results, summary: Summary) -> Html:
    items = [
        tag("li", tag("span", "Warning: ", class_="bad") if each.is_warning else "", each.text)
        for each in findings(results, summary)
    ]
    return section("Findings", tag("ul", *items)) if items else Html("")


def updates(results: Results, summary: Summary) -> Html:
    table_ = summary.times["updates"]
    ranked = {workload: ranks(table_, workload) for workload in results.workloads}
    rows = []
    for optimizer in summary.order:
        cells: list[str] = [_name(results, optimizer)]
        for workload in results.workloads:
            rank, text = ranked[workload][optimizer], formats.updates(table_[optimizer][workload])
            place = Html("") if rank is None else tag("small", f" ({rank:g})")
            cells.append(joined([tag("b", text) if rank == 1 else text, place]))
        rows.append(cells)
    text = (
        "Updates of the fastest trial, median over studies, with the rank on the workload in parentheses; equal ones "
        f"share their mean rank. {formats.NONE}: the target is not reached."
    )
    return section("Updates to the target", table(["Optimizer", *results.workloads], rows), note(text))


def sensitivity(results: Results, summary: Summary, pictures: Mapping[str, Html]) -> Html:
    rows = []
    for optimizer in summary.order:
        records = [results.cell(optimizer, name).records for name in results.workloads]
        metrics = [workload.metric for workload in results.workloads.values()]
        best = list(map(best_trial, records, metrics))
        keys = [*dict.fromkeys(key for record in best if record for key in record.values)]
        columns = [[formats.drawn_value(record.values.get(key)) for key in keys] if record else [] for record in best]
        short = [short_key(key, keys) for key in keys]
        rows.append([_name(results, optimizer), _lines(short), *map(_lines, columns)])
    return section(
        "Sensitivity",
        note("The percentage of the trials that reach the target. An optimizer with high percentages is easy to tune."),
        pictures["sensitivity"],
        tag("h3", "Best hyperparameters"),
        note("Those of the fastest trial of all studies; if none reaches the target, of the one with the best metric."),
        table(["Optimizer", "Key", *results.workloads], rows, texts=2),
    )  # fmt: skip


def costs(results: Results, summary: Summary) -> Html:
    if "time" not in summary.measures:
        return Html("")
    rows = []
    for optimizer in summary.order:
        cells: list[str] = [_name(results, optimizer)]
        for workload in results.workloads:
            cost = results.cell(optimizer, workload).cost
            spread = "" if cost is None else tag("small", f"{cost.low:.2f}–{cost.high:.2f}")
            cells.append(formats.NONE if cost is None else joined([f"{cost.time:.2f}", spread], "<br>"))
        standing = summary.standing(optimizer)
        rows.append([*cells, formats.number(standing.cost, ".2f"), formats.number(standing.state, ".1f")])
    text = (
        "Time of an update relative to SGD's, measured in pairs in one process: the median of the pairs, and below it "
        "their quartiles. All: geometric mean. State: memory of the optimizer's state relative to that of the "
        "parameters."
    )
    return section("Cost", table(["Optimizer", *results.workloads, "All", "State"], rows), note(text))


def tests(results: Results, summary: Summary) -> Html:
    names = [name for name in results.workloads if any(results.cell(each, name).tests for each in summary.order)]
    if not names:
        return Html("")
    rows = []
    for optimizer in summary.order:
        tested = [results.cell(optimizer, name).tests.values() for name in names]
        metrics = [*dict.fromkeys(metric for each in tested for test in each for metric in test)]
        columns = [
            [formats.mean_and_std([test[each] for test in cell if test.get(each) is not None]) for each in metrics]
            for cell in tested
        ]
        labels = [metric.removeprefix("test_").replace("_", " ") for metric in metrics]
        rows.append([_name(results, optimizer), _lines(labels), *map(_lines, columns)])
    text = (
        "Of the best trial of each study, which was chosen by the validation metric: mean ± sample standard deviation "
        "over studies. Test sets are read for this table only. By default, trials end at their target: these metrics "
        "show what the target is worth, not how well an optimizer can do."
    ) + _OUTSIDE * bool(results.shipped)
    return section("Test metrics", table(["Optimizer", "Metric", *names], rows, texts=2), note(text))


# -- method


def method() -> Html:
    items = [
        "A study's time on a workload is that of its fastest trial; an optimizer's is the median over studies.",
        "The performance ratio is this time divided by that of the fastest optimizer on the workload. A target that "
        f"is not reached, or a ratio above {MAX_RATIO:.0f}, counts as infinite.",
        "The profile is the fraction of workloads with a ratio of at most τ. The score is its integral over τ from 1 "
        f"to {MAX_RATIO:.0f}, divided by {MAX_RATIO - 1:.0f}. It depends on the set of optimizers, because ratios are "
        "to the fastest of them.",
        f"The intervals contain 95 % of the values of {RESAMPLES} resamples of the studies, drawn with replacement for "
        "each workload (bootstrap). They show the luck of tuning and seeds, not the choice of workloads.",
    ]
    sources = (
        "Sources: Dolan and Moré, Benchmarking optimization software with performance profiles, Mathematical "
        "Programming 91, 2002; Dahl et al., Benchmarking neural network training algorithms (AlgoPerf), "
        "arXiv:2306.07179, 2023."
    )
    return section("How scores are computed", tag("ul", *(tag("li", item) for item in items)), note(sources))
