"""The verdict of a leaderboard in one sentence: which rows the first one is better than."""

from collections.abc import Sequence
from typing import Literal

from dlopt.basics.formats import round_floats
from dlopt.results.leaderboard import Row

_MOST = 3  # names of rows in the sentence
_SHORT = 24  # characters of a label


def verdict(rows: Sequence[Row], *, lower: bool) -> str:
    """Returns a sentence on ranked rows; "" if there is nothing to compare. `lower`: whether smaller values are better.

    The first row is better than another one if the 95 % interval of their paired difference is on its side of 0. It may
    be on the other side: with other seeds, the order of the means is not that of the paired differences.
    """
    ranked = [row for row in rows if row.value is not None]
    if len(ranked) < 2 or any(row.data for row in ranked):  # a remark says that the data differ
        return ""
    labels = [round_floats(row.label) for row in ranked]
    # Labels of several keys would make the sentence unreadable: the table tells what #2 is.
    names = labels if max(map(len, labels)) <= _SHORT else [f"#{rank}" for rank in range(1, len(ranked) + 1)]
    values = [row.value for row in ranked if row.value is not None]
    if all(value.count == 1 for value in values):
        tied = [name for name, value in zip(names[1:], values[1:], strict=True) if value.mean == values[0].mean]
        first = f"is tied with {_listed(tied)}" if tied else "is first"
        return f"verdict: {names[0]} {first}, by one run each: repeat it with seed=0,1,2 to tell a gain from luck"
    gains = [_gain(row, lower) for row in ranked[1:]]
    better = [name for name, gain in zip(names[1:], gains, strict=True) if gain == "better"]
    if better:
        return f"verdict: {names[0]} has the best mean, but over common seeds it is worse than {_listed(better)}"
    unclear = [name for name, gain in zip(names[1:], gains, strict=True) if gain == "unclear"]
    if not unclear:
        return f"verdict: {names[0]} is better than all others (95 % intervals of the paired differences)"
    beaten = len(gains) - len(unclear)
    first = f"is better than {beaten} of {len(gains)} others" if beaten else "is first"
    return (
        f"verdict: {names[0]} {first}, but not distinguishable from {_listed(unclear)}: more seeds narrow the intervals"
    )


def _gain(row: Row, lower: bool) -> Literal["better", "worse", "unclear"]:
    """Says how a row compares with the first one, by the interval of their paired difference."""
    found = row.difference
    if found is None or found.low is None or found.high is None or found.low <= 0 <= found.high:
        return "unclear"
    return "better" if (found.mean < 0) == lower else "worse"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST])
    return shown if len(names) <= _MOST else f"{shown} and {len(names) - _MOST} more"
