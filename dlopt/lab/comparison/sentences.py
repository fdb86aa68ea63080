"""Writes the outcome of a claim: the verdict, the measured values of both sides, their ratio or difference."""

import math
import statistics
from collections.abc import Iterator
from typing import Literal

from dlopt.config.schema import show
from dlopt.lab.comparison.claims import Claim, Finding, Measured, effect_of, is_higher_better
from dlopt.lab.comparison.labels import label

Sign = Literal["", ">=", "<=", "?"]
_LARGEST_RATIO = 1000.0  # larger ratios depend on the last digits of tiny values
_MEASURES = {
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
    sign = "at least" if is_higher_better(claim.metric) else "at most"
    free = next((axis for axis in finding.first.point if axis not in finding.first.side.at), "value")
    what = _MEASURES[claim.measure].format(
        metric=label(claim.metric), axis=label(free), target="" if claim.target is None else f"{sign} {claim.target:g}"
    )
    kind = ", geometric mean" if claim.factor is not None and seeds > 1 else ""  # as of the ratio
    first, second = (average(claim, side) + _where(claim, side) for side in (finding.first, finding.second))
    margin = f"{claim.factor:.8g}x" if claim.factor is not None else f"{claim.difference:.3g}"
    parts = [f"{what[:1].upper()}{what[1:]}{kind}: {first} against {second}"]
    if finding.low is None or finding.high is None:
        parts.append("no interval: one seed" if seeds == 1 else "no interval: negative values")
    else:
        kind = "ratio" if claim.factor is not None else "difference"
        values = _with_interval(finding, "95 % interval")
        parts.append(f"{kind} {values}, {seeds} seeds, margin {margin}")
    return "; ".join(parts) + "."


def average(claim: Claim, measured: Measured) -> str:
    """Formats the mean over the seeds with a value: the geometric one if the margin is a factor, as that of ratios."""
    signs: set[str] = set()
    known: list[float] = []
    lost = 0
    for value, bound in zip(measured.values, _bounds(measured), strict=True):
        side = _side_of(value, bound)
        at_end = side == ">=" and value == bound  # of the grid
        if math.isinf(value) or (value == 0 and claim.measure in ("largest", "span")):
            lost += 1
        else:
            known.append(value)
            signs |= {side} if at_end else set()
    if not known:
        return _missing(measured)
    is_ratio = claim.factor is not None and min(known) >= 0
    mean = _geometric_mean(known) if is_ratio else statistics.fmean(known)
    of = f" ({lost} of {len(measured.values)} diverged or not reached)" if lost else ""
    # The ten digits in comparison.json must give the same text: unrounded, 0.9275 may become 0.927 or 0.928.
    return f"{'>= ' if signs else ''}{float(f'{mean:.9g}'):.3g}{of}"


def _missing(measured: Measured) -> str:
    """Describes a side without values."""
    bounds = [bound for bound in measured.bounds if bound is not None]
    if not bounds:
        return "diverged or not reached"
    if all(value == 0 for value in measured.values):
        return f"none, < {min(bounds):.3g}"
    return f"not reached within {max(bounds):.3g}"


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if min(values) > 0 else 0.0


def _where(claim: Claim, measured: Measured) -> str:
    side, free = measured.side, claim.measure in ("largest", "span")
    shown_at = [f"{label(axis)} {show(value)}" for axis, value in measured.point.items() if not free or axis in side.at]
    if side.value != "last":
        shown_at.append(f"epoch {side.value}" if isinstance(side.value, int) else side.value)
    return f" ({', '.join([side.variant, *shown_at])})"


def _with_interval(finding: Finding, interval: str) -> str:
    """Writes the effect and its interval; for censored or infinite effects, what holds in every seed."""
    assert finding.low is not None and finding.high is not None
    effects = list(_signed(finding))
    signs = {sign for sign, _ in effects} - {""}
    low_effect, high_effect = min(value for _, value in effects), max(value for _, value in effects)
    coincide = math.isclose(low_effect, high_effect, rel_tol=1e-9, abs_tol=1e-9)
    limited = " (grid-limited)" if coincide and finding.claim.measure in ("largest", "span") else ""
    if "?" in signs:
        return "not determined, both sides are censored"
    if len(signs) > 1:
        return "not determined, bounded below in some seeds and above in others"
    if signs:
        [sign] = signs
        finite = [value for _, value in effects if not math.isinf(value)]
        if not finite:
            return f"{'unbounded' if sign == '>=' else '-unbounded'} in every seed"
        return _bound(sign, min(finite) if sign == ">=" else max(finite), finding) + f" in every seed{limited}"
    effect, low, high = (_scaled(each, finding) for each in (finding.effect, finding.low, finding.high))
    if limited:
        return f"{effect} in every seed{limited}"
    if low == high:  # when rounded
        return f"{effect} (whole 95 % interval)"
    return f"{effect}, {interval} {low} to {high}"


def _signed(finding: Finding) -> Iterator[tuple[Sign, float]]:
    """Yields the effect of each seed, with its sign where it is only a bound."""
    claim = finding.claim
    pairs = zip(
        finding.first.values, _bounds(finding.first), finding.second.values, _bounds(finding.second), strict=True
    )
    for a, a_bound, b, b_bound in pairs:
        effect = effect_of(claim, *(v if c is None else c for v, c in ((a, a_bound), (b, b_bound))))
        up, down = _side_of(a, a_bound), _side_of(b, b_bound)
        if claim.relation == "lower":
            up, down = down, up
        bounds = {up, {">=": "<=", "<=": ">=", "": ""}[down]} - {""}
        if math.isinf(effect):
            yield ">=" if effect > 0 else "<=", effect
        elif len(bounds) > 1:
            yield "?", effect
        else:
            yield (">=" if ">=" in bounds else "<=" if bounds else ""), effect


def _bounds(measured: Measured) -> list[float | None]:
    return [*measured.bounds] or [None] * len(measured.values)


def _side_of(value: float, bound: float | None) -> Literal["", ">=", "<="]:
    """Returns on which side of its bound a value is: below, if it is 0."""
    return "" if bound is None else "<=" if value == 0 else ">="


def _bound(sign: Sign, effect: float, finding: Finding) -> str:
    text = _scaled(effect, finding)
    return text if text[0] in "<>" else f"{sign} {text}"


def _scaled(effect: float, finding: Finding) -> str:
    """Formats an effect as a ratio or difference, with two digits."""
    if finding.claim.factor is None:
        return f"{effect:.2g}"
    if abs(effect) > math.log(_LARGEST_RATIO) + 1e-9:
        return f"> {_LARGEST_RATIO:.0f}x" if effect > 0 else f"< {1 / _LARGEST_RATIO:g}x"
    ratio = math.exp(effect)
    # Below 2, the two digits are those of the change: 1.09x to 1.13x, not 1.1x to 1.1x.
    if 0.1 <= ratio < 9.95:
        return f"{ratio:.2f}x" if ratio < 1.995 else f"{ratio:.1f}x"
    return f"{float(f'{ratio:.2g}'):g}x"
