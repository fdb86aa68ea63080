"""The verdict of a leaderboard in one sentence: which rows the first one is better than."""

from collections.abc import Sequence

from dlopt.basics.formats import round_floats
from dlopt.results.leaderboard import Row

_MOST = 3  # names of rows in the sentence
_SHORT = 24  # characters of a label


def verdict(rows: Sequence[Row]) -> str:
    """Returns a sentence on ranked rows; "" if there is nothing to compare.

    The first row is better than another one if the 95 % interval of their paired difference excludes 0.
    """
    ranked = [row for row in rows if row.value is not None]
    if len(ranked) < 2:
        return ""
    others = ranked[1:]
    labels = [round_floats(row.label) for row in ranked]
    # Labels of several keys would make the sentence unreadable: the table tells what #2 is.
    names = labels if max(map(len, labels)) <= _SHORT else [f"#{rank}" for rank in range(1, len(ranked) + 1)]
    if all(row.value is not None and row.value.count == 1 for row in ranked):
        return f"verdict: {names[0]} is first, by one run each: repeat it with seed=0,1,2 to tell a gain from luck"
    unclear = [name for name, row in zip(names[1:], others, strict=True) if not _is_worse(row)]
    if not unclear:
        return f"verdict: {names[0]} is better than all others (95 % intervals of the paired differences)"
    named = ", ".join(unclear[:_MOST]) + (f" and {len(unclear) - _MOST} more" if len(unclear) > _MOST else "")
    beaten = len(others) - len(unclear)
    better = f" is better than {beaten} of {len(others)} others, but" if beaten else " is first, but"
    return f"verdict: {names[0]}{better} not distinguishable from {named}: more seeds narrow the intervals"


def _is_worse(row: Row) -> bool:
    """Returns whether a row is worse than the first one: their interval excludes 0, and the rank gives its sign."""
    found = row.difference
    return found is not None and found.low is not None and found.high is not None and not found.low <= 0 <= found.high
