"""Claims of a comparison: two sides, a margin, and a verdict from the differences over paired seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge

from dlopt.extend import Count, NonNegative, UserError, check_arguments, lower_is_better
from dlopt.lab.comparison.intervals import Bounds, Interval, interval
from dlopt.metrics.names import NONE, Directions
from dlopt.results.intervals import Edge

Value = bool | int | float | str | None
Relation = Literal["lower", "higher", "equal"]
When = Literal["last", "first", "minimum", "maximum", "mean"] | Count
Along = Literal["epoch", "step", "evaluation", "seconds"]
Measure = Literal["value", Along, "largest", "span"]
Verdict = Literal["supported", "inconclusive", "contradicted", "not judged"]
Written = str | dict[str, Any]  # a side in YAML: a variant, or the keys of `Side`

ALONG: tuple[Along, ...] = get_args(Along)
"""The axes of a curve: what a run has used up when it reaches a value."""
TEST_METRICS = ("test_loss", "test_accuracy")
"""Metrics of the best model, in summary.json."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a claim.

    Args:
        variant: its label.
        at: fixed axes and their values; the other axes take their best values by the mean over seeds.
        value: of the curve, the last, first, smallest, largest or mean value, or the value at an epoch (from 1).
    """

    variant: str
    at: dict[str, Value]
    value: When


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim: `metric` of each side in `first` is lower than, higher than, or equal to `second`'s.

    Args:
        text: the claim in words.
        when_not: when it does not hold.
        measure: what is compared: the metric's value; the epoch, update (`step`), evaluation of the training set or
            second at which it reaches `target`; the largest value of the only free axis at which it reaches `target`;
            or the ratio of the largest to the smallest such value (`span`).
        factor: margin of the ratio (1.5: at least 1.5x), or None.
        difference: margin of the difference, or None.
        directions: of the user's metrics.
    """

    text: str
    metric: str
    relation: Relation
    first: tuple[Side, ...]
    second: Side
    measure: Measure = "value"
    target: float | None = None
    factor: float | None = None
    difference: float | None = None
    when_not: str = ""
    directions: Directions = field(default_factory=dict)

    @property
    def is_higher_better(self) -> bool:
        return is_higher_better(self.metric, self.directions)

    @property
    def margin(self) -> float:
        """The margin on the scale of `effects`: the logarithm of the factor, or the difference."""
        return math.log(self.factor) if self.factor is not None else float(self.difference or 0)


def parse(key: str, written: Mapping[str, Any], directions: Directions = NONE) -> Claim:
    """Builds a claim from its YAML block `key`. `directions` of the user's metrics. Raises `UserError`."""
    keys = check_arguments(key, _schema, written)
    relations: tuple[Relation, ...] = get_args(Relation)
    given = [name for name in relations if keys.get(name) is not None]
    if len(given) != 1:
        raise UserError(f"{key}: set exactly one of {', '.join(relations)}")
    [relation] = given
    first, than = keys[relation], keys.get("than")
    first = first if isinstance(first, list) else [first]
    if relation == "equal":
        if than is not None or len(first) < 2:
            raise UserError(f"{key}.equal={first}: needs a list of two or more sides, and no key than")
        first, than = first[1:], first[0]
    elif than is None:
        raise UserError(f"{key}.than: a value is required: the variant to compare with")
    common = {"at": keys.get("at") or {}, "value": keys.get("value", "last")}
    claim = Claim(
        text=keys["claim"].rstrip("."),
        relation=relation,
        first=tuple(_side(f"{key}.{relation}", side, common) for side in first),
        second=_side(f"{key}.than", than, common),
        directions=directions,
        **{name: value for name, value in keys.items() if name in Claim.__dataclass_fields__},
    )
    target, factor = claim.target, claim.factor
    if (claim.measure == "value") == (target is not None):
        raise UserError(f"{key}.target={target}: set it exactly if measure is not value (measure={claim.measure})")
    if (factor is None) == (claim.difference is None):
        raise UserError(f"{key}: set factor (1.5: at least 1.5x) or difference (0.01), one of them, as margin")
    if factor is not None and claim.measure == "value" and "gap" in claim.metric:
        raise UserError(f"{key}.factor={factor}: a gap may be negative; set difference instead")
    return claim


def _schema(
    *,
    claim: str,
    metric: str,
    lower: Written | list[Written] | None = None,
    higher: Written | list[Written] | None = None,
    equal: list[Written] | None = None,
    than: Written | None = None,
    at: dict[str, Value] | None = None,
    value: When = "last",
    measure: Measure = "value",
    target: float | None = None,
    factor: Annotated[float, Ge(1)] | None = None,
    difference: NonNegative | None = None,
    when_not: str = "",
) -> None:
    """Declares the keys of a claim in YAML."""


def _side(key: str, written: Written, common: Mapping[str, Any]) -> Side:
    keys: dict[str, Any] = {"variant": written} if isinstance(written, str) else dict(written)
    at = {**common["at"], **keys.get("at", {})}
    return Side(**check_arguments(key, Side, {**common, **keys, "at": at}))


def is_higher_better(metric: str, directions: Directions = NONE) -> bool:
    """Returns whether larger values are better. `directions`: of the user's metrics."""
    return not lower_is_better(metric, directions)


# -- verdicts


@dataclass(frozen=True)
class MeasuredSide:
    """A side with its values, one per seed (infinite: diverged, or the target was not reached).

    `point`: where they were measured: axis -> value. `bounds`: bounds of censored values, one per seed
    (empty: none is censored): a run of 300 updates that misses the target needs at least 300, and a usable rate at the
    end of the grid is at least the largest one; a side with no usable rate has less than the smallest one.
    `edges`: the axes whose best value is the smallest or largest of the grid, so that a better one may be beyond it.
    """

    side: Side
    point: Mapping[str, Value]
    values: Sequence[float]
    bounds: Sequence[float | None] = ()
    edges: Mapping[str, Edge] = field(default_factory=dict)

    def ranges(self) -> list[Bounds]:
        """Returns the bounds of each value: the smallest and the largest possible value."""
        return [
            (value, value) if bound is None else (0.0, bound) if value == 0 else (bound, math.inf)
            for value, bound in zip(self.values, self.bounds or [None] * len(self.values), strict=True)
        ]


@dataclass(frozen=True)
class Finding:
    """The outcome of a claim.

    Args:
        interval: of the differences in the claim's direction (of logarithms, if the margin is a factor); None with
            fewer than two seeds, or for ratios of negative values.
    """

    claim: Claim
    first: MeasuredSide
    second: MeasuredSide
    verdict: Verdict
    interval: Interval | None


def judge(claim: Claim, first: MeasuredSide, second: MeasuredSide) -> Finding:
    """Compares the values of two sides, paired by seed.

    Supported: the whole interval is beyond the margin (for `equal`: within, unless all runs diverged). Contradicted:
    the whole interval is on the other side of zero (for `equal`: outside the margin). `intervals` says which interval.
    """
    found = interval(effects(claim, first, second))
    verdict: Verdict = "inconclusive"
    margin, rounding = claim.margin, 1e-9
    if found is not None:
        low, high = found.low, found.high
        if claim.relation == "equal":
            if max(-low, high) <= margin + rounding and any(map(math.isfinite, (*first.values, *second.values))):
                verdict = "supported"
            elif low > margin or high < -margin:
                verdict = "contradicted"
        elif low >= margin - rounding and low > rounding:
            verdict = "supported"
        elif high < -rounding:
            verdict = "contradicted"
    return Finding(claim, first, second, verdict, found)


def effects(claim: Claim, first: MeasuredSide, second: MeasuredSide) -> list[Bounds]:
    """Returns how far each pair is in the claimed direction, as bounds: a censored value has bounds itself."""
    found = []
    for a, b in zip(first.ranges(), second.ranges(), strict=True):
        ends = [effect_of(claim, *pair) for pair in product(a, b)]
        found.append((math.nan, math.nan) if any(map(math.isnan, ends)) else (min(ends), max(ends)))
    return found


def effect_of(claim: Claim, a: float, b: float) -> float:
    """Returns how far a pair is in the claimed direction; 0 if both diverged."""
    a, b = (b, a) if claim.relation == "lower" else (a, b)
    if claim.factor is not None:  # a diverged run has the accuracy -inf, which counts as 0 in a ratio
        a, b = (0.0 if value == -math.inf else value for value in (a, b))
    if a == b:
        return 0.0
    if claim.factor is None:
        return a - b
    if min(a, b) < 0:
        return math.nan  # no ratio: never supported
    return math.inf if b == 0 or a == math.inf else -math.inf if a == 0 or b == math.inf else math.log(a / b)


def weakest(findings: Sequence[Finding]) -> Finding:
    """Returns the finding that decides a claim about several sides: the least convincing one."""

    def strength(finding: Finding) -> tuple[int, float]:
        order = ("inconclusive", "contradicted", "supported").index(finding.verdict)
        found = finding.interval
        low = -math.inf if found is None else found.low
        if finding.claim.relation == "equal" and found is not None:
            low = -max(-low, found.high)
        return order, low

    return min(findings, key=strength)
