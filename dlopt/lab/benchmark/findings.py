"""Writes what a benchmark shows, and what is wrong with it, in sentences."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dlopt.basics.formats import printable
from dlopt.lab.benchmark import formats
from dlopt.lab.benchmark.formats import MEASURE_LABELS, names
from dlopt.lab.benchmark.results import Measure, Results
from dlopt.lab.benchmark.scores import Summary
from dlopt.lab.benchmark.symptoms import symptoms


@dataclass(frozen=True)
class Observation:
    """A sentence; `is_warning`: something to mend or to keep in mind, instead of a result."""

    text: str
    is_warning: bool = False


def findings(results: Results, summary: Summary) -> list[Observation]:
    """Returns the results, then the warnings. Shipped optimizers are not warned about."""
    own = [optimizer for optimizer in summary.order if optimizer not in results.shipped]
    shown = [Observation(printable(text)) for text in _results(results, summary, own)]
    warnings = [f"{optimizer} {text}" for optimizer in own for text in symptoms(results, optimizer)]
    warnings += [*_unreached(results, summary), *_unmeasured(results, summary), *_budget(results, summary, own)]
    return shown + [Observation(printable(text), is_warning=True) for text in warnings]


# -- results


def _results(results: Results, summary: Summary, own: Sequence[str]) -> Iterator[str]:
    if not results.has_targets:
        return
    if len(summary.order) == 1:
        yield f"{summary.order[0]} is alone: its score is the fraction of the targets that it reaches."
        return
    for measure in summary.measures:
        yield from _leader(summary, measure)
    if results.shipped:
        for optimizer in own:
            yield _position(summary, optimizer)


def _leader(summary: Summary, measure: Measure) -> Iterator[str]:
    ranked = [each.optimizer for each in summary.standings[measure]]
    leader, *others = [each for each in ranked if summary.score(each, measure) is not None]
    score = summary.standing(leader, measure).score
    if not score.value:
        if measure == "updates":
            yield "No optimizer reaches a target."
        return
    text = f"In {MEASURE_LABELS[measure]}, {leader} has the highest score, {formats.interval(score)}."
    pairs = {other: summary.comparisons[measure][leader, other] for other in others}
    open_ = [other for other, pair in pairs.items() if not pair.distinguishable]
    if open_:
        text += f" Not distinguishable from it: {_all_or(open_, others)}."
    elif others:
        text += " All others have lower scores."
    yield text


def _position(summary: Summary, optimizer: str) -> str:
    """Compares an optimizer with all others, in updates."""
    place, total = summary.order.index(optimizer) + 1, len(summary.order)
    pairs = {other: summary.comparisons["updates"][optimizer, other] for other in summary.order if other != optimizer}
    rest = [*pairs]
    groups = {
        "higher than that of": [other for other, pair in pairs.items() if pair.low > 0],
        "lower than that of": [other for other, pair in pairs.items() if pair.high < 0],
    }
    relations = [f"{relation} {_all_or(others, rest)}" for relation, others in groups.items() if others]
    open_ = [other for other, pair in pairs.items() if not pair.distinguishable]
    text = f"{optimizer} is number {place} of {total} in updates."
    text += f" Its score is {', and '.join(relations)}." if relations else ""
    return text + (f" Not distinguishable from it: {_all_or(open_, rest)}." if open_ else "")


def _all_or(some: Sequence[str], others: Sequence[str]) -> str:
    return "all others" if len(some) == len(others) > 1 else names(some)


# -- warnings about the whole


def _unreached(results: Results, summary: Summary) -> Iterator[str]:
    table = summary.times["updates"]
    if without := [name for name, workload in results.workloads.items() if math.isnan(workload.target)]:
        yield f"No target is fixed for {names(without)}."
    known = [name for name in results.workloads if name not in without]
    lost = [name for name in known if not any(math.isfinite(row[name]) for row in table.values())]
    if lost and len(lost) < len(known):
        verb = "decide" if len(lost) > 1 else "decides"
        yield f"No optimizer reaches the target of {names(lost)}, which {verb} nothing and counts as 0 for all."


def _unmeasured(results: Results, summary: Summary) -> Iterator[str]:
    if "time" in summary.measures:
        lost = [each.optimizer for each in summary.standings["time"] if each.cost is None]
        if lost:
            yield f"No time per update was measured for {names(lost)}: no score in time."
    elif len(summary.order) > 1:
        yield "The time per update was not measured on all workloads: there is no score in time."


def _budget(results: Results, summary: Summary, own: Sequence[str]) -> Iterator[str]:
    expected = sum(results.studies_of(name) for name in own) * len(results.workloads) * results.trials
    if missing := results.missing():
        yield f"{missing} of {expected} trials have not ended: the scores are preliminary."
    reference = results.facts.get("reference", {})
    size = results.studies, results.trials
    full = reference.get("studies", results.studies), reference.get("trials", results.trials)
    if results.shipped and (size[0] < full[0] or size[1] < full[1]):
        yield (
            f"The budget is {_size(*size)}; the shipped results have {_size(*full)}, and are reduced to the same "
            "trials. The full budget tells optimizers apart better."
        )
    if results.shipped and size[1] > full[1]:
        yield (
            f"The budget is {_size(*size)}, but the shipped results have only {_size(*full)}: shipped optimizers are "
            "tuned less and look worse than they are."
        )
    if results.studies == 1:
        yield "One study has no interval: no two optimizers are distinguishable."
    elif len(summary.order) > 1 and results.has_targets:
        counts = {name: results.studies_of(name) for name in results.optimizers}
        more = {count: [name for name in counts if counts[name] == count] for count in sorted({*counts.values()})}
        rest = "".join(f", of {names(each)} from {count}" for count, each in more.items() if count > results.studies)
        margins = formats.names(
            f"{next(iter(pairs.values())).half:.2f} in {MEASURE_LABELS[measure]}"
            for measure, pairs in summary.comparisons.items()
        )
        yield (
            f"The scores come from {results.studies} studies{rest}. Scores of two optimizers are distinguishable if "
            f"they differ by more than {margins}, with an error of 5 % for all pairs together. More studies tell more "
            "optimizers apart."
        )


def _size(studies: int, trials: int) -> str:
    return f"{studies} {'studies' if studies > 1 else 'study'} of {trials} {'trials' if trials > 1 else 'trial'}"
