"""The words of a judgement: gains in the unit of the metric, the verdict, and how often such a verdict is wrong."""

import math
from typing import TYPE_CHECKING

from dlopt.basics.formats import format_count
from dlopt.metrics.shown import is_percent, words

if TYPE_CHECKING:
    from dlopt.lab.judge.ledger import Entry


def scale(metric: str) -> float:
    """Returns what turns a gain into the unit that is shown: points of an accuracy, otherwise that of the metric."""
    return 100.0 if is_percent(metric) else 1.0


def size(metric: str, value: float) -> str:
    """Formats the size of a gain without its unit: 0.42 of an accuracy in points, 0.01234 of a loss."""
    shown = scale(metric) * abs(value)
    is_two_decimals = is_percent(metric) and (shown >= 0.005 or shown == 0)
    return f"{shown:.2f}" if is_two_decimals else f"{shown:.4g}"


def signed(metric: str, value: float) -> str:
    sign = "" if value == 0 else "-" if value < 0 else "+"
    return sign + size(metric, value)


def unit(metric: str) -> str:
    return " points" if is_percent(metric) else ""


def pair_line(metric: str, number: int, gain: float, low: float, high: float) -> str:
    """Describes a pair that has ended, and the interval after it."""
    if math.isinf(gain):
        shown = f"the {'change' if gain < 0 else 'base'} diverged"
    else:
        shown = signed(metric, gain) + unit(metric)
    ends = interval_text(metric, low, high)
    return f"  pair {number}: {shown}; {f'so far {ends}' if ends else 'no interval yet'}"


def interval_text(metric: str, low: float, high: float) -> str:
    """Formats the ends with their signs; "" if both are infinite."""
    if math.isfinite(low) and math.isfinite(high):
        return f"{signed(metric, low)} to {signed(metric, high)}"
    if math.isfinite(low):
        return f"{signed(metric, low)} or more"
    return f"{signed(metric, high)} or less" if math.isfinite(high) else ""


def sentences(entry: "Entry", ledger_rate: float) -> list[str]:
    """Describes the verdict, the gain with its interval, and how often such a verdict is wrong."""
    pairs = format_count("pairs", entry.pairs) + " of runs"
    if entry.verdict == "same":
        return [f"Undecided: the change has done nothing so far: {pairs} have exactly equal metrics."]
    if entry.pairs == 0:
        return ["Undecided: no pair of runs has ended."]
    (few, of), (any_few, of_bases) = frequency(entry.rate), frequency(ledger_rate)
    if entry.verdict in ("better", "worse"):
        return [
            f"{entry.verdict.capitalize()} {_amount(entry)} in {pairs}.",
            f"Of {of} changes that do nothing, at most {few} are called better or worse;",
            f"of {of_bases} bases with many changes each, at most {any_few} get any such wrong verdict.",
        ]
    verdict = "Undecided: "
    if entry.verdict == "equal":
        verdict += f"no difference of more than {_margin(entry)}; "
    low, high = (math.nan if each is None else each for each in (entry.low, entry.high))
    ends = interval_text(entry.metric, low, high)
    if entry.estimate is None or not ends:
        return [f"{verdict}no interval of the gain after {pairs}."]
    gain = f"a gain of {signed(entry.metric, entry.estimate)}{_of_metric(entry.metric)} ({ends})"
    return [f"{verdict}{gain} in {pairs}.", f"Of {of} such intervals, at most {few} miss the true gain."]


def _amount(entry: "Entry") -> str:
    """Returns "by 0.42 points of validation accuracy (0.18 to 0.66)", in the direction of the verdict."""
    ends = sorted(abs(each) for each in (entry.low, entry.high) if each is not None)
    if entry.estimate is None or not ends:
        diverged = sum(map(math.isinf, entry.gains))
        return f"because the {'base' if entry.verdict == 'better' else 'change'} diverged {diverged} times"
    interval = " to ".join(size(entry.metric, each) for each in ends) + " or more" * (len(ends) == 1)
    beyond = f", more than the margin of {_margin(entry)}," if entry.margin else ""
    return f"by {size(entry.metric, entry.estimate)}{_of_metric(entry.metric)} ({interval}){beyond}"


def _of_metric(metric: str) -> str:
    """Returns what follows a gain: " points of validation accuracy", " in validation loss"."""
    name = words(metric) or "the metric"
    return f" points of {name}" if is_percent(metric) else f" in {name}"


def _margin(entry: "Entry") -> str:
    return size(entry.metric, entry.margin) + unit(entry.metric)


def frequency(rate: float) -> tuple[int, str]:
    """Returns a probability, rounded up, as a count and of how many: (4, "100") for 0.0304, (8, "1,000") for 0.0076."""
    total = 100
    while rate * total < 1:
        total *= 10
    return math.ceil(rate * total - 1e-9), f"{total:,}"
