"""Remarks on the rows of a leaderboard: what a mean, a rank or an interval does not show.

A remark has a letter, which marks its rows in each table, and a line below the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

from dlopt.basics.formats import brief
from dlopt.basics.plain_values import flatten
from dlopt.basics.roles import Role
from dlopt.config.keys import role_of
from dlopt.metrics.names import Goal
from dlopt.results.intervals import edge
from dlopt.results.leaderboard import Row, differs, is_number, of_common_seeds, resolution

_NOT_SHOWN = {"code": "code of allow_packages", "versions": "versions of dlopt or torch"}
"""Of `Record.origin`: what a mean over runs does not show."""


@dataclass(frozen=True)
class Remark:
    """A line about the rows with the given ranks, from 1."""

    text: str
    ranks: Sequence[int]


def remarks(rows: Sequence[Row], metric: str, direction: Goal) -> list[Remark]:
    """Returns the remarks on ranked rows, in the order of the rows: other seeds, the resolution, the end of a grid."""
    ranked = [(rank, row) for rank, row in enumerate(rows, 1) if row.value is not None]
    if not ranked:
        return []
    found = [*_seeds(ranked, metric, direction), *_origins(rows), *_resolution(ranked, metric)]
    found.append(Remark(_end_of_grid([row for _, row in ranked], rows), [1]))
    known = [remark for remark in found if remark.ranks and remark.text]
    return sorted(known, key=lambda remark: remark.ranks[0])


def mark(found: Sequence[Remark], rank: int) -> str:
    """Returns the letters of the remarks on a row: "ac"."""
    return "".join(letter for letter, remark in zip(ascii_lowercase, found, strict=False) if rank in remark.ranks)


def texts(found: Sequence[Remark], rank: int) -> list[str]:
    """Returns the remarks on a row."""
    return [remark.text for remark in found if rank in remark.ranks]


def lines(found: Sequence[Remark], shown: int) -> list[str]:
    """Returns the lines below a table with the first `shown` rows; a remark on others begins with their ranks."""
    return [
        f"{letter if any(rank <= shown for rank in remark.ranks) else _named(remark.ranks)}: {remark.text}"
        for letter, remark in zip(ascii_lowercase, found, strict=False)
    ]


def _seeds(ranked: Sequence[tuple[int, Row]], metric: str, direction: Goal) -> list[Remark]:
    """Compares the seeds of the rows: repeated ones, missing ones, and ranks that follow from them."""
    repeated = [rank for rank, row in ranked if row.repeated(metric)]
    seeds = [values.keys() for values in of_common_seeds([row.by_seeds(metric) for _, row in ranked])]
    every = set().union(*seeds)
    missing = [rank for (rank, _), own in zip(ranked, seeds, strict=True) if own != every]
    sign = 1.0 if direction == "maximize" else -1.0
    better = [
        rank
        for (rank, row), own in zip(ranked[1:], seeds[1:], strict=True)
        if own != seeds[0] and row.difference is not None and sign * row.difference.mean > 0
    ]
    is_one = len(better) == 1
    return [
        Remark("a seed was run more than once: its last run that has ended counts", repeated),
        Remark(
            "warning: without some seeds of other rows: compare by the difference over common seeds, not by the mean",
            missing,
        ),
        Remark(
            f"warning: {_named(better)} {'is' if is_one else 'are'} better than #1 over common seeds: #1 is first "
            f"because of its other seeds",
            [1, *better] if better else [],
        ),
    ]


def _origins(rows: Sequence[Row]) -> list[Remark]:
    """Compares the data of the rows, and the code and the versions of the runs of each row."""
    unlike = [rank for rank, row in enumerate(rows, 1) if row.data]
    found = [Remark("warning: differ in their data, so the metrics are not comparable", unlike)]
    for key, name in _NOT_SHOWN.items():
        mixed = [
            rank
            for rank, row in enumerate(rows, 1)
            if any(differs(run.origin.get(key), row.runs[0].origin.get(key)) for run in row.runs)
        ]
        found.append(Remark(f"warning: runs with different {name} in one mean", mixed))
    return found


def _resolution(ranked: Sequence[tuple[int, Row]], metric: str) -> list[Remark]:
    """Names the rows whose differences are equal, and those whose interval was widened to the resolution."""
    step = resolution([row for _, row in ranked], metric)
    equal, widened = [], []
    for rank, row in ranked:
        difference = row.difference
        if difference is None or difference.count < 2:
            continue
        if difference.low is None:
            equal.append(rank)
        elif step is not None and difference.mean - difference.low <= step.size * (1 + 1e-9):
            widened.append(rank)
    if step is None:
        return [Remark("the same difference in every seed, so no interval", equal)]
    size = f"{100 * step.size:.2g} points"
    limit = f"differences below {size} (1 of {step.count:,} {step.unit}) cannot be seen"
    return [
        Remark(f"the same difference in every seed, so no interval: {limit}", equal),
        Remark(f"interval widened to ± {size}: {limit}", widened),
    ]


def _end_of_grid(ranked: Sequence[Row], rows: Sequence[Row]) -> str:
    """Names the numbers of the best row that are the smallest or the largest that its optimizer was tried with."""
    names = ("optimizer", "optimizer._target_")
    first, *configs = (flatten(row.runs[0].config) for row in (ranked[0], *rows))
    tried, best = [], []
    for row, config in zip(rows, configs, strict=True):
        if any(config.get(name) != first.get(name) for name in names):
            continue
        tried.append(config)
        if row.value is not None and ranked[0].value is not None and row.value.mean == ranked[0].value.mean:
            best.append(config)
    found = []
    for key, value in first.items():
        if not is_number(value) or role_of(key) is not Role.IDENTITY:
            continue
        end = edge(_numbers(best, key), _numbers(tried, key))
        if end == "largest" or (end == "smallest" and value != 0):  # less than none cannot be tried
            found.append(f"{key}={brief(value)} ({end})")
    if not found:
        return ""
    return f"best at the end of what was tried, a better value may be beyond it: {', '.join(found)}"


def _numbers(configs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for config in configs if is_number(value := config.get(key))]


def _named(ranks: Sequence[int]) -> str:
    """Formats "#2, #3 and 5 more"."""
    shown = ", ".join(f"#{rank}" for rank in ranks[:5])
    return shown if len(ranks) <= 5 else f"{shown} and {len(ranks) - 5} more"
