"""Gathers the findings of a benchmark, and its flaws; findings.txt has the sentences."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlopt.lab.benchmark import formats
from dlopt.lab.benchmark.results import Results
from dlopt.lab.benchmark.scores import Summary
from dlopt.lab.benchmark.symptoms import symptoms
from dlopt.lab.report import Observation, observations


def findings(results: Results, summary: Summary) -> list[Observation]:
    """Returns the results, then the warnings. Shipped optimizers are not warned about."""
    own = [optimizer for optimizer in summary.order if optimizer not in results.shipped]
    is_compared = results.has_targets and len(summary.order) > 1
    known = {name for name, workload in results.workloads.items() if not math.isnan(workload.target)}
    times = summary.times["updates"].values()
    unreached = [name for name in results.workloads if name in known and all(math.isinf(row[name]) for row in times)]
    studies = {name: results.studies_of(name) for name in results.optimizers}
    return observations(
        Path(__file__).with_name("findings.txt"),
        results=results, order=summary.order, measures=summary.measures, formats=formats,
        leaders=[*_leaders(summary)] if is_compared else [],
        positions=[_position(summary, optimizer) for optimizer in own] if is_compared and results.shipped else [],
        symptoms=[row for optimizer in own for row in symptoms(results, optimizer)],
        without_target=[name for name in results.workloads if name not in known],
        unreached=unreached if len(unreached) < len(known) else [],
        without_time=[each.optimizer for each in summary.standings.get("time", ()) if each.cost is None],
        missing=results.missing(),
        expected=sum(studies[name] for name in own) * len(results.workloads) * results.trials,
        full={"studies": results.studies, "trials": results.trials} | results.facts.get("reference", {}),
        more_studies={
            count: [name for name in studies if studies[name] == count]
            for count in sorted({*studies.values()}) if count > results.studies
        },
        margins=[
            f"{next(iter(pairs.values())).half:.2f} in {formats.MEASURE_LABELS[measure]}"
            for measure, pairs in summary.comparisons.items() if pairs
        ],
    )  # fmt: skip


def _leaders(summary: Summary) -> Iterator[dict[str, Any]]:
    """Yields the first optimizer of each measure with the others that have a score, and those `open` to it."""
    for measure in summary.measures:
        ranked = [each.optimizer for each in summary.standings[measure]]
        leader, *others = [each for each in ranked if summary.score(each, measure) is not None]
        pairs = summary.comparisons[measure]
        yield {
            "measure": formats.MEASURE_LABELS[measure], "optimizer": leader, "others": others,
            "score": summary.standing(leader, measure).score,
            "open": [other for other in others if not pairs[leader, other].distinguishable],
        }  # fmt: skip


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
