"""Remarks on the rows of a leaderboard: what a mean, a rank or an interval does not show.

A remark has a letter, which marks its rows in each table, and a line below the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

from dlopt.basics.formats import brief
from dlopt.basics.plain_values import flatten
from dlopt.basics.roles import Role
from dlopt.config.keys import role_of
from dlopt.metrics.names import Goal, split_of
from dlopt.results.intervals import FEWEST, edge
from dlopt.results.leaderboard import (
    FOLD,
    ORIGINS,
    OTHER_FOLDS,
    Leaderboard,
    Row,
    differs,
    is_number,
    of_common_seeds,
    resolution,
)


@dataclass(frozen=True)
class Remark:
    """A line about the rows with the given ranks, from 1."""

    text: str
    ranks: Sequence[int]


def remarks(board: Leaderboard) -> list[Remark]:
    """Returns the remarks on ranked rows, in their order: seeds, data, the resolution, the end of a grid."""
    ranked = [(rank, row) for rank, row in enumerate(board.rows, 1) if row.value is not None]
    if not ranked:
        return []
    paired = [(rank, row) for rank, row in ranked if row.apart != OTHER_FOLDS]
    found = [*_seeds(paired, board.metric, board.direction), *_origins(board.rows), *_folds(ranked, board.metric)]
    found += _resolution(ranked, board.metric)
    found += _ends_of_grids(ranked, board.rows)
    known = [remark for remark in found if remark.ranks and remark.text]
    return sorted(known, key=lambda remark: remark.ranks[0])


def mark(found: Sequence[Remark], rank: int) -> str:
    """Returns the letters of the remarks on a row: "ac"."""
    return "".join(letter for letter, remark in zip(ascii_letters, found, strict=False) if rank in remark.ranks)


def texts(found: Sequence[Remark], rank: int) -> list[str]:
    """Returns the remarks on a row."""
    return [remark.text for remark in found if rank in remark.ranks]


def lines(found: Sequence[Remark], shown: int) -> list[str]:
    """Returns the lines below a table with the first `shown` rows; a remark on others begins with their ranks."""
    return [
        f"{letter if any(rank <= shown for rank in remark.ranks) else _named(remark.ranks)}: {remark.text}"
        for letter, remark in zip(ascii_letters, found, strict=False)
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
    """Compares the data, the code and the versions of the rows with those of the first one, and of the runs of each."""
    found = []
    for key, name in ORIGINS.items():
        apart = [rank for rank, row in enumerate(rows, 1) if row.apart == name]
        mixed = [
            rank
            for rank, row in enumerate(rows, 1)
            if any(differs(run.origin.get(key), row.runs[0].origin.get(key)) for run in row.runs)
        ]
        found.append(Remark(f"warning: other {name} than #1, so not comparable with it", apart))
        found.append(Remark(f"warning: runs with different {name} in one mean", mixed))
    return found


def _folds(ranked: Sequence[tuple[int, Row]], metric: str) -> list[Remark]:
    """Says what counts of a fold, and names rows with other folds, or other seeds in them."""
    rows = [(rank, row) for rank, row in ranked if row.folds is not None]
    first = ranked[0][1]

    def seeds(row: Row) -> set[tuple[tuple[str, Any], ...]]:
        return {run.seeds for run in row.counted(metric)}

    def is_uneven(row: Row) -> bool:
        """Whether some of its folds have seeds that others lack."""
        of: dict[object, set[object]] = {}
        for run in row.counted(metric):
            of.setdefault(run.fold, set()).add(tuple(pair for pair in run.seeds if pair[0] != FOLD))
        return len({frozenset(each) for each in of.values()}) > 1

    apart = [rank for rank, row in ranked if row.apart == OTHER_FOLDS]
    partial = [rank for rank, row in rows if len(row.folds_with(metric)) < (row.folds or 0)]
    uneven = [rank for rank, row in rows if is_uneven(row) or (not row.apart and seeds(row) != seeds(first))]
    ended = [rank for rank, row in rows if any(run.status == "stopped_early" for run in row.counted(metric))]
    tested = any(split_of(name) == "test" for _, row in rows for run in row.runs for name in run.metrics)
    test = "; test metrics are those of the best epoch, which the fold chose" if tested else ""
    return [
        Remark("warning: other folds than #1, so not comparable with it", apart),
        Remark("a mean over some of the folds: the others may be harder", partial),
        Remark("warning: its folds have not the same seeds, or not those of #1", uneven),
        Remark("warning: stopped early, perhaps by the fold that is reported: its value is then optimistic", ended),
        Remark(f"folds: the last epoch counts, because the fold would choose the best one{test}", [r for r, _ in rows]),
    ]


def _resolution(ranked: Sequence[tuple[int, Row]], metric: str) -> list[Remark]:
    """Names the rows that equal the first one, those without an interval, and those whose interval was widened."""
    step, first = resolution([row for _, row in ranked], metric), ranked[0][1]
    same, constant, widened, lost = [], [], [], []
    for rank, row in ranked:
        difference = row.difference
        if row.has_lost:
            lost.append(rank)
        if difference is None or difference.count < 2:
            continue
        if row.by_seeds(metric) == first.by_seeds(metric):
            same.append(rank)
        elif difference.low is None:
            constant += [rank] * (difference.count >= FEWEST and not row.has_lost and not first.has_lost)
        elif step is not None and difference.mean - difference.low <= step.size * (1 + 1e-9):
            widened.append(rank)
    size = "" if step is None else f"{100 * step.size:.2g} points"
    limit = "" if step is None else f"differences below {size} (1 of {step.count:,} {step.unit}) cannot be seen"
    return [
        Remark("equal to #1 in every run", same),
        Remark("the same difference in every seed, so no interval" + (f": {limit}" if limit else ""), constant),
        Remark(f"interval widened to ± {size}: {limit}", widened),
        Remark("warning: some of its runs failed, and the others are no fair sample: no interval", lost),
    ]


def _ends_of_grids(ranked: Sequence[tuple[int, Row]], rows: Sequence[Row]) -> list[Remark]:
    """Names the numbers of each optimizer's best row that are the smallest or the largest that it was tried with."""
    names = ("optimizer", "optimizer._target_")
    configs = [flatten(row.runs[0].config) for row in rows]
    optimizers = [tuple(str(config.get(name)) for name in names) for config in configs]
    found = {}
    for rank, row in ranked:
        optimizer = optimizers[rank - 1]
        if optimizer in found or row.apart == ORIGINS["data"]:
            continue
        tried = [
            config
            for config, other, each in zip(configs, optimizers, rows, strict=True)
            if other == optimizer and each.apart != ORIGINS["data"]  # whose keys describe the data, and tune nothing
        ]
        best = [configs[i - 1] for i, each in ranked if optimizers[i - 1] == optimizer and each.rank == row.rank]
        ends = []
        for key, value in configs[rank - 1].items():
            if not is_number(value) or role_of(key) is not Role.IDENTITY:
                continue
            end = edge(_numbers(best, key), _numbers(tried, key))
            if end == "largest" or (end == "smallest" and value != 0):  # less than none cannot be tried
                ends.append(f"{key}={brief(value)} ({end})")
        text = f"best at the end of what was tried, a better value may be beyond it: {', '.join(ends)}" if ends else ""
        found[optimizer] = Remark(text, [rank])
    return list(found.values())


def _numbers(configs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for config in configs if is_number(value := config.get(key))]


def _named(ranks: Sequence[int]) -> str:
    """Formats "#2, #3 and 5 more"."""
    shown = ", ".join(f"#{rank}" for rank in ranks[:5])
    return shown if len(ranks) <= 5 else f"{shown} and {len(ranks) - 5} more"
