"""Evaluates the claims of a comparison on its runs, and records rows and verdicts (comparison.json)."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dlopt.extend import UserError, key_of, show
from dlopt.lab.comparison.claims import (
    ALONG,
    TEST_METRICS,
    Claim,
    Finding,
    MeasuredSide,
    Side,
    Value,
    judge,
    weakest,
)
from dlopt.lab.comparison.comparison import Comparison, Results, VariantOutcome, are_numbers, matches
from dlopt.lab.comparison.published import record_published
from dlopt.lab.comparison.sentences import numbers, sentence
from dlopt.results.intervals import Edge, edge

Point = tuple[Value, ...]


def check(comparison: Comparison, *, overridden: bool) -> list[Claim]:
    """Returns the claims that can be evaluated: all, unless the user changed the variants or axes (`overridden`).

    Raises `UserError` for a claim about a variant, axis or value that the comparison does not have.
    """
    able = []
    for i, claim in enumerate(comparison.claims):
        problem = _problem(comparison, claim)
        if problem is None:
            able.append(claim)
        elif not overridden:
            raise UserError(f"comparison.claims.{i}: {problem}")
    return able


def _problem(comparison: Comparison, claim: Claim) -> str | None:
    for side in (*claim.first, claim.second):
        if side.variant not in comparison.variants:
            return f"unknown variant {side.variant}; allowed: {', '.join(comparison.variants)}"
        for axis, value in side.at.items():
            if axis not in comparison.along:
                return f"at.{axis}: not an axis of the comparison; allowed: {', '.join(comparison.along) or 'none'}"
            if not any(matches(each, value) for each in comparison.along[axis]):
                values = ", ".join(map(show, comparison.along[axis]))
                return f"at.{axis}={show(value)}: not a value of this axis; allowed: {values}"
        free = [axis for axis in comparison.along if axis not in side.at]
        if claim.measure in ("largest", "span"):
            settings = [*comparison.along[free[0]]] if len(free) == 1 else []
            if not are_numbers(settings) or min(map(float, settings)) <= 0:
                return f"measure={claim.measure}: needs one free axis of numbers; free: {', '.join(free) or 'none'}"
        elif (
            claim.measure == "value"
            and claim.metric in TEST_METRICS
            and comparison.choose is None
            and _points(comparison, side)[1:]
        ):
            return f"metric={claim.metric}: set comparison.choose to a validation metric, or fix the point with at"
    return None


def evaluate(results: Results, claims: Sequence[Claim]) -> list[Finding]:
    """Evaluates claims; a claim about several sides is decided by the least convincing one.

    The verdict of a quick comparison is always "not judged".
    """
    found = []
    for claim in claims:
        second = _measured(results, claim, claim.second)
        finding = weakest([judge(claim, _measured(results, claim, side), second) for side in claim.first])
        found.append(replace(finding, verdict="not judged") if results.comparison.quick else finding)
    return found


def _points(comparison: Comparison, side: Side) -> list[Point]:
    """Returns the points of the axes that agree with `side.at`."""
    cells = [cell.point for cell in comparison.cells() if cell.variant == side.variant]
    fixed = [(i, side.at[axis]) for i, axis in enumerate(comparison.along) if axis in side.at]
    return [point for point in dict.fromkeys(cells) if all(matches(point[i], value) for i, value in fixed)]


def _measured(results: Results, claim: Claim, side: Side) -> MeasuredSide:
    """Measures a side per seed, at the point with the best mean over seeds.

    The mean is that of `comparison.choose` or of the measured values themselves. Points at which fewer seeds diverge or
    miss the target come first.
    """
    comparison = results.comparison
    points, axes = _points(comparison, side), [*comparison.along]
    values = {
        point: [_value(run, claim, side.value) for run in results.over_seeds(side.variant, point)] for point in points
    }
    if claim.measure in ("largest", "span"):
        [free] = [i for i, axis in enumerate(axes) if axis not in side.at]
        at = [float(point[free]) for point in points]  # type: ignore[arg-type]
        extents = [_extent(claim, at, [values[point][i] for point in points]) for i in range(len(comparison.seeds))]
        found, bounds = zip(*extents, strict=True)
        return _measurement(side, dict(zip(axes, points[0], strict=True)), found, bounds)
    metric, scores = claim.metric, values
    if claim.measure == "value" and comparison.choose is not None:
        metric = comparison.choose
        scores = results.finals(side.variant, metric)
    sign = -1 if claim.measure == "value" and comparison.is_higher_better(metric) else 1

    costs = {point: _cost(scores[point], sign) for point in points}
    best = min(points, key=lambda point: costs[point])
    runs = zip(values[best], results.over_seeds(side.variant, best), strict=True)
    lengths = [_length(run, claim) if math.isinf(value) else None for value, run in runs]
    edges = _edges(comparison, side, [point for point in points if costs[point] == costs[best]])
    return _measurement(side, dict(zip(axes, best, strict=True)), values[best], lengths, edges)


def _cost(scores: Sequence[float], sign: int) -> tuple[int, float]:
    """Returns the seeds that diverged or did not reach the target, then the mean of the others."""
    finite = [value for value in scores if math.isfinite(value)]
    mean = sign * math.fsum(finite) / max(len(finite), 1)
    return len(scores) - len(finite), float(f"{mean:.9g}")  # equal points stay equal in the record, of ten digits


def _measurement(
    side: Side,
    point: dict[str, Value],
    values: Sequence[float],
    bounds: Sequence[float | None],
    edges: Mapping[str, Edge] | None = None,
) -> MeasuredSide:
    return MeasuredSide(
        side, point, [*values], [*bounds] if any(bound is not None for bound in bounds) else [], edges or {}
    )


def _edges(comparison: Comparison, side: Side, best: Sequence[Point]) -> dict[str, Edge]:
    """Returns the axes of numbers of which all best points have the smallest or the largest value of the grid."""
    fixed = {*side.at, *map(key_of, comparison.variants[side.variant])}
    found: dict[str, Edge] = {}
    for i, (axis, values) in enumerate(comparison.along.items()):
        if axis in fixed or not are_numbers([*values]):
            continue
        at = [float(point[i]) for point in best]  # type: ignore[arg-type]
        if (end := edge(at, [*map(float, values)])) is not None:  # type: ignore[arg-type]
            found[axis] = end
    return found


def _length(outcome: VariantOutcome, claim: Claim) -> float | None:
    """Returns where a run ended that may have missed the target; None for other measures, and if it failed."""
    if outcome.failed or claim.measure not in ALONG:
        return None
    return max(outcome.curve(claim.metric, claim.measure)[0], default=None)


def _value(outcome: VariantOutcome, claim: Claim, when: str | int) -> float:
    """Reduces a run to one number; a diverged run has the worst one: infinite."""
    worst = -math.inf if claim.is_higher_better else math.inf
    if claim.measure in ALONG:
        x, values = outcome.curve(claim.metric, claim.measure)
        reached = [at for at, value in zip(x, values, strict=True) if _reaches(claim, value)]
        return math.inf if outcome.failed or not reached else reached[0]
    if outcome.failed:
        return worst
    if when == "last":
        value = outcome.final(claim.metric)
    else:
        x, values = outcome.curve(claim.metric, "epoch")
        value = _reduced(x, values, when)
    return worst if math.isnan(value) else value


def _reduced(x: Sequence[float], values: Sequence[float], when: str | int) -> float:
    if not values:
        return math.nan
    if isinstance(when, int):
        return dict(zip(x, values, strict=True)).get(float(when), math.nan)
    parts = {"first": values[0], "minimum": min(values), "maximum": max(values), "mean": statistics.fmean(values)}
    return parts[when]


def _reaches(claim: Claim, value: float) -> bool:
    assert claim.target is not None
    return value >= claim.target if claim.is_higher_better else value <= claim.target


def _extent(claim: Claim, grid: Sequence[float], values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the largest axis value that reaches the target, or its ratio to the smallest; 0 if none does.

    With its bound, if it is at the end of the grid or there is none, see `MeasuredSide`.
    """
    usable = [position for position, value in zip(grid, values, strict=True) if _reaches(claim, value)]
    if not usable:
        return 0.0, min(grid) if claim.measure == "largest" else None
    found = max(usable) if claim.measure == "largest" else max(usable) / min(usable)
    at_end = max(usable) == max(grid) or (claim.measure == "span" and min(usable) == min(grid))
    return found, found if at_end else None


# -- record


def record(results: Results, findings: Sequence[Finding], frozen: Mapping[str, Any] | None = None) -> str:
    """Formats comparison.json: the final metrics of every point per seed, and the claims with their verdicts.

    `frozen`: of claims.json.
    """
    comparison = results.comparison
    rows = []
    for variant in comparison.variants:
        columns = {name: results.finals(variant, name) for name in comparison.metrics}
        for point in next(iter(columns.values())):
            metrics = {name: [_finite(value) for value in column[point]] for name, column in columns.items()}
            rows.append({"variant": variant, "at": dict(zip(comparison.along, point, strict=True)), **metrics})
    content = {
        "title": comparison.title,
        "seeds": comparison.seeds,
        **({"quick": True} if comparison.quick else {}),
        **(frozen or {}),
        "rows": rows,
        **record_published(results),
        "claims": [*map(entry_of, findings)],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def entry_of(finding: Finding) -> dict[str, Any]:
    """Returns the entry of a claim in comparison.json."""
    claim = finding.claim
    return {
        "claim": claim.text,
        "verdict": finding.verdict,
        "outcome": numbers(finding),
        "sentence": sentence(finding),
        "when_not": claim.when_not,
        "sides": [
            {"variant": each.side.variant, "at": dict(each.point), "values": [*map(_finite, each.values)]}
            | ({"bounds": [None if bound is None else _finite(bound) for bound in each.bounds]} if each.bounds else {})
            | ({"edges": dict(each.edges)} if each.edges else {})
            for each in (finding.first, finding.second)
        ],
    }


def judged_again(results: Results, claim: Claim, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a claim's entry of comparison.json with the verdict and the outcome that its values have now.

    For runs that are gone. `results`: the final values. Of several sides, the one in the entry counts.
    """
    comparison = results.comparison
    first = next(side for side in claim.first if _is_of(side, entry["sides"][0]))
    measured = []
    for side, saved in zip((first, claim.second), entry["sides"], strict=True):
        best = [tuple(saved["at"].values())]
        metric = (comparison.choose or claim.metric) if claim.measure == "value" else None
        if metric in comparison.metrics and (comparison.choose is not None or side.value == "last"):
            assert metric is not None
            finals = results.finals(side.variant, metric)
            costs = {point: _cost(finals[point], 1) for point in _points(comparison, side)}
            best = [point for point, cost in costs.items() if cost == costs[best[0]]]
        edges = _edges(comparison, side, best) if claim.measure not in ("largest", "span") else {}
        measured.append(_measurement(side, saved["at"], [*map(float, saved["values"])], saved.get("bounds", []), edges))
    return entry_of(judge(claim, *measured))


def _is_of(side: Side, saved: Mapping[str, Any]) -> bool:
    """Returns whether an entry of comparison.json is of this side."""
    return saved["variant"] == side.variant and all(matches(saved["at"][axis], at) for axis, at in side.at.items())


def _finite(value: float) -> float | str | None:
    """Rounds to ten digits; null for NaN, "inf" or "-inf" for infinities, which JSON does not have."""
    if math.isnan(value):
        return None
    return str(value) if math.isinf(value) else float(f"{value:.10g}")
