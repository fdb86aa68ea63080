"""Gathers the findings of a benchmark, and its flaws; findings.txt has the sentences."""

import math
from pathlib import Path
from typing import Any

from dlopt.lab.benchmark import formats
from dlopt.lab.benchmark.results import Measure, Results
from dlopt.lab.benchmark.scores import Summary
from dlopt.lab.benchmark.symptoms import Symptom, symptoms
from dlopt.lab.report import Observation, observations


def findings(results: Results, summary: Summary) -> list[Observation]:
    """Returns the results, then the warnings. Shipped optimizers are not warned about."""
    own = [optimizer for optimizer in summary.order if optimizer not in results.shipped]
    leaders: list[dict[str, Any]] = []
    positions: list[dict[str, Any]] = []
    if results.has_targets and len(summary.order) > 1:
        leaders = [_leader(summary, measure) for measure in summary.measures]
        if results.shipped:
            positions = [_position(summary, optimizer) for optimizer in own]
    own_symptoms: list[Symptom] = []
    for optimizer in own:
        own_symptoms += symptoms(results, optimizer)
    expected_studies = sum(results.studies_of(optimizer) for optimizer in own)
    full = {"studies": results.studies, "trials": results.trials} | results.facts.get("reference", {})
    return observations(
        Path(__file__).with_name("findings.txt"),
        results=results,
        order=summary.order,
        measures=summary.measures,
        formats=formats,
        leaders=leaders,
        positions=positions,
        symptoms=own_symptoms,
        without_target=[name for name, spec in results.workloads.items() if math.isnan(spec.target)],
        unreached=_unreached(results, summary),
        without_time=[each.optimizer for each in summary.standings.get("time", ()) if each.cost is None],
        missing=results.missing(),
        expected=expected_studies * len(results.workloads) * results.trials,
        full=full,
        more_studies=_more_studies(results),
        margins=_margins(summary),
    )


def _leader(summary: Summary, measure: Measure) -> dict[str, Any]:
    """Returns the first optimizer of a measure with the others that have a score, and those `open` to it."""
    ranked = [standing.optimizer for standing in summary.standings[measure]]
    leader, *others = [name for name in ranked if summary.score(name, measure) is not None]
    pairs = summary.comparisons[measure]
    return {
        "measure": formats.MEASURE_LABELS[measure],
        "optimizer": leader,
        "others": others,
        "score": summary.standing(leader, measure).score,
        "open": [other for other in others if not pairs[leader, other].distinguishable],
    }


def _position(summary: Summary, optimizer: str) -> dict[str, Any]:
    """Compares an optimizer with all others, in updates."""
    pairs = {other: summary.comparisons["updates"][optimizer, other] for other in summary.order if other != optimizer}
    return {
        "optimizer": optimizer,
        "others": [*pairs],
        "better": [other for other, pair in pairs.items() if pair.low > 0],
        "worse": [other for other, pair in pairs.items() if pair.high < 0],
        "open": [other for other, pair in pairs.items() if not pair.distinguishable],
    }


def _unreached(results: Results, summary: Summary) -> list[str]:
    """Returns the workloads whose target no optimizer reaches; [] if no optimizer reaches any target."""
    with_target = [name for name, spec in results.workloads.items() if not math.isnan(spec.target)]
    times = summary.times["updates"].values()
    unreached = [name for name in with_target if all(math.isinf(row[name]) for row in times)]
    return unreached if len(unreached) < len(with_target) else []


def _more_studies(results: Results) -> dict[int, list[str]]:
    """Returns numbers of studies above that of these results -> the optimizers that have so many."""
    found: dict[int, list[str]] = {}
    for name in results.optimizers:
        count = results.studies_of(name)
        if count > results.studies:
            found.setdefault(count, []).append(name)
    return dict(sorted(found.items()))


def _margins(summary: Summary) -> list[str]:
    """Returns the distinguishable difference of two scores in each measure, the same for all pairs."""
    texts = []
    for measure, pairs in summary.comparisons.items():
        if pairs:
            first = next(iter(pairs.values()))
            texts.append(f"{first.half:.2f} in {formats.MEASURE_LABELS[measure]}")
    return texts
