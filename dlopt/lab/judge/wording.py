"""The words of a judgement: gains in the unit of the metric, the verdict, and how often such a verdict is wrong."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlopt.basics.formats import format_count, printable
from dlopt.metrics.measures import MEASURES
from dlopt.metrics.shown import is_percent, words

COSTS = {
    "steps": "updates", "samples": "samples", "parameters": "parameters", "flops": "FLOPs", "seconds": "time",
    "peak_memory": "memory",
}  # fmt: skip
"""What a run costs, by its name in summary.json."""
_WORTH_A_WARNING = 1.1

if TYPE_CHECKING:
    from dlopt.lab.judge.ledger import Entry


def scale(metric: str) -> float:
    """Returns what turns a gain into the unit that is shown: points of an accuracy, otherwise that of the metric."""
    return 100.0 if is_percent(metric) else 1.0


def size(metric: str, value: float) -> str:
    """Formats the size of a gain without its unit: 0.42 of an accuracy in points, 0.01234 of a loss."""
    shown = scale(metric) * abs(value)
    if not is_percent(metric):
        return f"{shown:.4g}"
    return f"{shown:.2f}" if shown >= 0.005 or shown < 0.00005 else f"{shown:.4f}"


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


def cost_lines(entry: "Entry") -> list[str]:
    """Returns a table of the costs of both sides."""
    rows: list[Sequence[str]] = [("cost of a run (median)", "base", "change", "ratio")]
    for name, title in COSTS.items():
        times = entry.times(name)
        values = [entry.cost(side, name) for side in ("base", "change")]
        shown = ["unknown" if each is None else MEASURES[name].show(each) for each in values]
        rows.append((title, *shown, "unknown" if times is None else f"{times:.3g}"))
    names, *numbers = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([title.ljust(names), *(each.rjust(width) for each, width in zip(row, numbers, strict=True))])
        for title, *row in rows
    ]


def cost_warning(entry: "Entry", lengths: Sequence[str]) -> str | None:
    """Returns a warning of a change that costs more than the base; None if it does not. `lengths`: keys it changes."""
    known = {name: times for name in COSTS if (times := entry.times(name)) is not None}
    ways = {"updates": "steps", "flops": "flops" if "flops" in known else "samples", "time": "seconds"}
    more = {way: name for way, name in ways.items() if known.get(name, 0) > _WORTH_A_WARNING}
    if not more:
        return None
    way = next((way for way, name in more.items() if name != "samples"), "time")
    advice = "" if entry.equal else f": judge it at equal cost with equal={way}"
    if lengths:
        advice = f": a longer training may be all that it gains; leave out {', '.join(lengths)} to judge the rest"
    shown = ", ".join(f"{known[name]:.3g} times the {COSTS[name]}" for name in more.values())
    return f"warning: the change costs {shown}{advice}"


def ledger_row(entry: "Entry") -> dict[str, Any]:
    """Returns what the document of a ledger says of a proposal, in few words."""
    time = entry.times("seconds")
    return {
        "proposal": entry.number,
        "change": " ".join(entry.change)[:120],
        "verdict": entry.verdict,
        "gain": None if entry.estimate is None else float(f"{entry.estimate:.3g}"),
        "pairs": entry.pairs,
        "times_the_time": None if time is None else float(f"{time:.3g}"),
        **({"because": entry.because[:120]} if entry.because else {}),
        **({"of": entry.of} if entry.of else {}),
    }


def ledger_lines(entries: Sequence["Entry"]) -> list[str]:
    """Returns a table of the proposals, each with why it was made."""
    rows: list[Sequence[str]] = [("", "verdict", "gain", "interval", "pairs", "time", "change")]
    for entry in entries:
        low, high = (
            math.copysign(math.inf, sign) if end is None else end for sign, end in ((-1, entry.low), (1, entry.high))
        )
        gain = "" if entry.estimate is None else signed(entry.metric, entry.estimate) + unit(entry.metric)
        time = entry.times("seconds")
        change = " ".join(entry.change) if entry.of is None else f"{entry.of} without a part: {' '.join(entry.change)}"
        why = f" (because: {entry.because})" if entry.because else ""
        rows.append((
            str(entry.number), entry.verdict, gain, interval_text(entry.metric, low, high), str(entry.pairs),
            "" if time is None else f"{time:.3g}x", printable(change + why),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


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
