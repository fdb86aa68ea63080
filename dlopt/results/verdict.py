"""The verdict of a leaderboard in one sentence: which rows the first one is better than."""

from collections.abc import Mapping, Sequence
from typing import Literal

from dlopt.basics.formats import round_floats
from dlopt.config.overrides import key_of, value_of
from dlopt.metrics.shown import is_percent
from dlopt.results.intervals import FEWEST
from dlopt.results.leaderboard import Leaderboard, Row

_MOST = 3  # names of rows in the sentence
_SHORT = 24  # characters of a label
_ENOUGH = 100  # seeds that are suggested at most

Found = Literal["better", "worse", "equal", "tied", "unclear", "few", "lost"]


def verdict(board: Leaderboard) -> str:
    """Returns a sentence on ranked rows; "" if there is nothing to compare.

    The first row is better than another one if the interval of their difference is on its side of 0. It may be on the
    other side: with other seeds, the order of the means is not that of the paired differences. Rows that a remark sets
    apart, with other data or code, are not counted.
    """
    ranked = [row for row in board.rows if row.value is not None]
    others = [row for row in ranked[1:] if not row.apart]
    if not others:
        return ""
    left = sum(run.status == "running" for row in board.rows for run in row.runs)
    if left:
        return f"verdict: after the last run; {left} {'is' if left == 1 else 'are'} running"
    first, found = ranked[0], [_found(ranked[0], row, board) for row in others]
    # Labels of several keys would make the sentence unreadable: the table tells what #2 is.
    labels = [round_floats(row.label) for row in (first, *others)]
    if max(map(len, labels)) > _SHORT:
        labels = [f"#{row.rank}" for row in (first, *others)]
    name, *names = labels
    of: dict[Found, list[str]] = {}
    for label, each in zip(names, found, strict=True):
        of.setdefault(each, []).append(label)
    if of.get("worse"):
        return (
            f"verdict: {name} has the best mean, but over common {board.blocks} it is worse than {_listed(of['worse'])}"
        )
    head, tied = f"{name} is first", of.get("tied", [])
    if tied:
        is_label = not name.startswith("#")
        head = f"{name} is tied with {_listed(tied)}" if is_label else f"{1 + len(tied)} rows are tied for #1"
    counts = {len(row.by_seeds(board.metric)) for row in (first, *others)}
    if max(counts) < FEWEST and "equal" not in of:
        number = _folds(counts) if first.folds else _runs(counts)
        return f"verdict: {head}, by {number} each: {_advice(first, counts, is_tied=bool(tied))}"
    if beaten := of.get("better", []):
        are_few = len(others) == 1 or len(beaten) < min(len(others), _MOST + 1)
        number = "all others" if len(beaten) == len(others) else f"{len(beaten)} of {len(others)} others"
        looks = " and all looks at it" if board.comparison.seen else ""
        head = f"{name} is better than {_listed(beaten) if are_few else number} (95 % for the whole table{looks})"
    return f"verdict: {'; '.join([head, *_rest(of, len(others), board), *_looks(board)])}"


def findings(board: Leaderboard) -> dict[Found, list[str]]:
    """Returns how the first row compares with the others: the verdict as labels; {} if there is none."""
    of: dict[Found, list[str]] = {}
    if not any(run.status == "running" for row in board.rows for run in row.runs):
        for row in board.rows[1:]:
            if row.value is not None and not row.apart:
                of.setdefault(_found(board.rows[0], row, board), []).append(row.label)
    return of


def _found(first: Row, row: Row, board: Leaderboard) -> Found:
    """Says how a row compares with the first one."""
    difference = row.difference
    one, other = first.by_seeds(board.metric), row.by_seeds(board.metric)
    if one == other:
        return "equal" if len(one) > 1 else "tied"
    if first.has_lost or row.has_lost:
        return "lost"
    if difference is None or difference.count < FEWEST:
        return "tied" if row.is_first else "few"
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return "tied" if row.is_first else "unclear"
    return "better" if (difference.mean < 0) == (board.direction == "maximize") else "worse"


def _rest(of: Mapping[Found, Sequence[str]], others: int, board: Leaderboard) -> list[str]:
    """Returns what is said of the rows that the first one is not better than."""
    parts = []
    if "unclear" in of:
        is_every = len(of["unclear"]) == others > _MOST
        names = f"any of the {others} others" if is_every else _listed(of["unclear"])
        parts.append(f"not distinguishable from {names}: {_limit(board)}".removesuffix(": "))
    elif "tied" in of:
        parts += [_limit(board)] if _limit(board) else []
    if "equal" in of:
        parts.append(f"equal to {_listed(of['equal'])} in every run")
    if "few" in of:
        parts.append(f"not compared with {_listed(of['few'])}: fewer than {FEWEST} common {board.blocks}")
    if "lost" in of:
        parts.append(f"not compared with {_listed(of['lost'])}: some of the runs failed")
    return parts


def _limit(board: Leaderboard) -> str:
    """Says how small a difference these seeds show, and how many seeds would show half of that."""
    compared = [row for row in board.rows[1:] if row.value is not None and not row.apart]
    for i, row in enumerate(compared):
        found = row.difference
        if found is None or found.low is None or found.high is None or not found.low <= 0 <= found.high:
            continue
        half = found.high - found.mean
        limit = f"{found.count} {board.blocks} cannot tell differences below {_size(board.metric, half)}"
        if row.folds is not None:
            return f"{limit}; more seeds would not shrink the part of the folds"
        for seeds in range(found.count + 1, _ENOUGH + 1):
            later = board.comparison.half_width(i, seeds)
            if later <= half / 2:
                return f"{limit}; {seeds}, fixed now, would tell {_size(board.metric, later)}"
        return limit
    return ""


def _looks(board: Leaderboard) -> list[str]:
    from dlopt.results.simultaneous import rate_of  # imports NumPy, which the help does not need

    seen = board.comparison.seen
    if not seen:
        return []
    return [
        f"{'runs' if board.blocks == 'folds' else 'seeds'} were added after a look at {' and '.join(map(str, seen))}, "
        f"so this one has {100 * rate_of(1 + len(seen)):.2g} of the 5 % of errors"
    ]


def _advice(first: Row, counts: set[int], *, is_tied: bool) -> str:
    if first.folds is not None:
        folds = max(first.folds, FEWEST)
        return f"{FEWEST} to {folds} folds tell a gain from luck: data.folds={folds} data.fold={_all(folds)}"
    typed = [line for run in first.runs for line in run.overrides]
    if any(key_of(line) == "resume" and value_of(line) != "auto" for line in typed):
        return "branch from runs with other seeds, too, to tell a gain from luck"
    if counts == {1}:
        return f"repeat {'them' if is_tied else 'it'} with seed=0,1,2 to tell a gain from luck"
    return f"at least {FEWEST} seeds, fixed before, tell a gain from luck: seed=0,1,2"


def _runs(counts: set[int]) -> str:
    return "one run" if counts == {1} else "at most two runs"


def _folds(counts: set[int]) -> str:
    return "one fold" if counts == {1} else "at most two folds"


def _all(folds: int) -> str:
    return ",".join(map(str, range(folds))) if folds <= 10 else f"range(0,{folds})"


def _size(metric: str, value: float) -> str:
    if not is_percent(metric):
        return f"{value:.2g}"
    points = f"{100 * value:.2g}"
    return f"{points} point{'' if points == '1' else 's'}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST])
    return shown if len(names) <= _MOST else f"{shown} and {len(names) - _MOST} more"
