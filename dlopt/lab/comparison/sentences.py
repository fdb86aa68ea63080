"""Writes the outcome of a claim: the verdict, the measured values of both sides, their ratio or difference."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from dlopt.extend import show
from dlopt.lab.comparison import intervals
from dlopt.lab.comparison.claims import Claim, Finding, Measure, MeasuredSide, effects
from dlopt.lab.comparison.intervals import Bounds, Interval, kind_of
from dlopt.lab.comparison.labels import is_percent, label, scale

_LARGEST_RATIO = 1000.0  # larger ratios depend on the last digits of tiny values
_MEASURES: Mapping[Measure, str] = {
    "value": "{metric}",
    "epoch": "epochs to {metric} {target}",
    "step": "updates to {metric} {target}",
    "evaluation": "evaluations of the training set to {metric} {target}",
    "seconds": "seconds to {metric} {target}",
    "largest": "largest {axis} with {metric} {target}",
    "span": "usable range of {axis}, largest / smallest with {metric} {target}",
}


def sentence(finding: Finding) -> str:
    """Writes the outcome of a claim: verdict, measured values, interval."""
    return f"{finding.verdict.capitalize()}: {finding.claim.text}. {numbers(finding)}"


def numbers(finding: Finding) -> str:
    """Writes the measured values of both sides, their difference and its interval."""
    claim, seeds = finding.claim, len(finding.first.values)
    free = next((axis for axis in finding.first.point if axis not in finding.first.side.at), "value")
    what = _MEASURES[claim.measure].format(
        metric=label(claim.metric),
        axis=label(free),
        target=_target(claim),
    )
    kind = _kind(claim, seeds)
    first, second = (average(claim, side) + _where(claim, side) for side in (finding.first, finding.second))
    margin = f"{claim.factor:.8g}x" if claim.factor is not None else _digits(claim, claim.margin, 3)
    parts = [f"{what[:1].upper()}{what[1:]}{kind}: {first} against {second}"]
    if finding.interval is None:
        parts.append("no interval: one seed" if seeds == 1 else "no interval: negative values")
    else:
        kind = "ratio" if claim.factor is not None else "difference"
        kind += " in points:" * _is_percent(claim)
        parts.append(f"{kind} {_with_interval(finding, finding.interval)}, {seeds} seeds, margin {margin}")
    return "; ".join(parts) + "."


def _kind(claim: Claim, seeds: int) -> str:
    """Names the average over the seeds, which is of the kind of the interval's estimate."""
    kind = kind_of(seeds, claim.factor is not None)
    return "" if kind == "mean" else f", {kind}"


def average(claim: Claim, measured: MeasuredSide) -> str:
    """Formats the average over the seeds with a value; like ratios, a geometric mean if the margin is a factor."""
    at_end, lost = False, 0
    known: list[float] = []
    for value, (_, most) in zip(measured.values, measured.ranges(), strict=True):
        if math.isinf(value) or (value == 0 and claim.measure in ("largest", "span")):
            lost += 1
        else:
            known.append(value)
            at_end |= math.isinf(most)  # of the grid
    if not known:
        return _missing(measured)
    middle = intervals.average(known, is_ratio=claim.factor is not None, seeds=len(measured.values)).middle
    of = f" ({lost} of {len(measured.values)} diverged or not reached)" if lost else ""
    # The ten digits in comparison.json must give the same text: unrounded, 0.9275 may become 0.927 or 0.928.
    shown = _digits(claim, float(f"{middle:.9g}"), 3)
    unit = "" if not _is_percent(claim) else " points" if claim.metric.endswith("_gap") else " %"
    return f"{'>= ' if at_end else ''}{shown}{unit}{of}"


def _is_percent(claim: Claim) -> bool:
    """Returns whether the values of a claim are accuracies, which readers see in percent."""
    return claim.measure == "value" and is_percent(claim.metric)


def _digits(claim: Claim, value: float, digits: int) -> str:
    """Formats a value or a difference; of accuracies in percent or points, without the unit."""
    if not _is_percent(claim):
        return f"{value:.{digits}g}"
    return f"{float(f'{scale(claim.metric) * value:.{digits}g}'):g}"


def _target(claim: Claim) -> str:
    if claim.target is None:
        return ""
    unit = " %" if is_percent(claim.metric) else ""
    return f"{'at least' if claim.is_higher_better else 'at most'} {scale(claim.metric) * claim.target:g}{unit}"


def _missing(measured: MeasuredSide) -> str:
    """Describes a side without values."""
    bounds = [bound for bound in measured.bounds if bound is not None]
    if not bounds:
        return "diverged or not reached"
    if all(value == 0 for value in measured.values):
        return f"none, < {min(bounds):.3g}"
    return f"not reached within {max(bounds):.3g}"


def _where(claim: Claim, measured: MeasuredSide) -> str:
    """Names the variant and its point; a best value at the end of its grid is named as such."""
    side, free = measured.side, claim.measure in ("largest", "span")
    shown_at = [
        f"{label(axis)} {show(value)}{f', the {measured.edges[axis]} tried' if axis in measured.edges else ''}"
        for axis, value in measured.point.items()
        if not free or axis in side.at
    ]
    if side.value != "last":
        shown_at.append(f"epoch {side.value}" if isinstance(side.value, int) else side.value)
    return f" ({', '.join([side.variant, *shown_at])})"


def _with_interval(finding: Finding, found: Interval) -> str:
    """Writes the estimate and its interval; for censored or infinite differences, the bound that is known."""
    known = effects(finding.claim, finding.first, finding.second)
    if math.isinf(found.high):
        if math.isinf(found.low) and found.low < 0:
            is_censored = any(math.isinf(low) and math.isinf(high) and low < high for low, high in known)
            both = "in some seeds only a bound of both sides is known"
            reason = both if is_censored else "bounded below in some seeds and above in others"
            return f"not determined, {reason}"
        return _bounded(finding, found, ">=", [low for low, _ in known])
    if math.isinf(found.low):
        return _bounded(finding, found, "<=", [high for _, high in known])
    if limited := _limited(finding, known):
        return f"{_scaled(found.least, finding)} in every seed{limited}"
    estimate, low, high = (_scaled(each, finding) for each in (found.least, found.low, found.high))
    if found.method == "range":
        return f"{low} in every seed" if low == high else f"{low} to {high} in every seed"
    if not math.isclose(found.least, found.most):
        estimate = _bound(">=", found.least, finding)
    if low == high:  # when rounded
        return f"{estimate} (whole 95 % interval)"
    return f"{estimate}, 95 % interval {low} to {high}"


def _bounded(finding: Finding, found: Interval, sign: Literal[">=", "<="], ends: Sequence[float]) -> str:
    """Writes an interval with one end: the bound of the estimate, and the end; `ends`: the bounds of the pairs."""
    estimate, end = (found.least, found.low) if sign == ">=" else (found.most, found.high)
    finite = [value for value in ends if not math.isinf(value)]
    if not finite:
        return f"{'unbounded' if sign == '>=' else '-unbounded'} in every seed"
    worst = min(ends) if sign == ">=" else max(ends)
    if found.method == "range" or math.isclose(estimate, worst, rel_tol=1e-9, abs_tol=1e-9):
        limited = _limited(finding, [(value, value) for value in finite])
        return f"{_bound(sign, worst, finding)} in every seed{limited}"
    shown = "unbounded" if math.isinf(estimate) else _bound(sign, estimate, finding)
    limit = _scaled(end, finding)
    limit = limit if limit[0] in "<>" else f"{'from' if sign == '>=' else 'up to'} {limit}"
    return f"{shown}, 95 % interval {limit}"


def _limited(finding: Finding, known: Sequence[Bounds]) -> str:
    """Returns a remark if all seeds have the same point of the grid."""
    low, high = min(low for low, _ in known), max(high for _, high in known)
    coincide = math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-9)
    return " (limited by the grid)" if coincide and finding.claim.measure in ("largest", "span") else ""


def _bound(sign: Literal[">=", "<="], effect: float, finding: Finding) -> str:
    text = _scaled(effect, finding)
    return text if text[0] in "<>" else f"{sign} {text}"


def _scaled(effect: float, finding: Finding) -> str:
    """Formats an effect as a ratio or difference, with two digits."""
    if finding.claim.factor is None:
        # 0, not the 5.6e-17 that is left of 0.93 - 0.93, and not -0.
        return _digits(finding.claim, round(effect, 9) + 0.0, 2)
    if abs(effect) > math.log(_LARGEST_RATIO) + 1e-9:
        return f"> {_LARGEST_RATIO:.0f}x" if effect > 0 else f"< {1 / _LARGEST_RATIO:g}x"
    ratio = math.exp(effect)
    # Below 2, two digits of the change: 1.09x to 1.13x, not 1.1x to 1.1x.
    if 0.1 <= ratio < 9.95:
        return f"{ratio:.2f}x" if ratio < 1.995 else f"{ratio:.1f}x"
    return f"{float(f'{ratio:.2g}'):g}x"
