"""Finds held-out rows of a table that are nearly equal to a training row, such as a patient measured twice.

The distance between two rows leaves out the column that differs most, and is compared with the distance to a few
training rows. With N training rows in d dimensions, the nearest one is by chance within r times the distance to the
nearest of n of them with probability N / n r^d. Two such numbers n give d, which is often less than the columns.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dlopt.basics.random import generator
from dlopt.data.checks import WARNING
from dlopt.data.samples import InMemory, Samples

# Evenly spaced rows and columns that are compared at most: 0.4 s of one core for a held-out set.
_COMPARED, _COLUMNS = {"val": 1000, "test": 1000, "train": 20_000}, 64
_NAMES = {"val": "validation", "test": "test"}
_FEWEST_ROWS, _FEWEST_COLUMNS = 60, 5
_REPEATED = 0.1  # a column with one value in more of the rows, such as a category, does not tell rows apart
_CHANCE = 0.01  # rows of a split that are expected to be as near by chance
_NEAREST = 0.05  # of the distance to a few training rows, at most
_CLOSE = 0.01  # standard deviations by which all columns but one may differ
_NORMAL = 1.349  # standard deviations between the quartiles of a normal distribution
_CHUNK = 64  # rows: their distances stay in the cache


def near_duplicate_warnings(splits: Mapping[str, Samples | None]) -> tuple[str, ...]:
    """Returns a line for each held-out split with rows that are nearly, but not quite, equal to training rows.

    `splits`: train, val and test; those that are no vectors of floating-point numbers in memory are left out.
    """
    tables = {
        name: each
        for name, each in splits.items()
        if isinstance(each, InMemory) and each.inputs.ndim == 2 and each.inputs.is_floating_point()
    }
    lines = []
    for name, label in _NAMES.items():
        if not {name, "train"} <= tables.keys():
            continue
        table, train = tables[name], tables["train"]
        own, known = _spaced(len(table), _COMPARED[name]), _spaced(len(train), _COMPARED["train"])
        rows, nearest = near_duplicates(table.inputs[own], train.inputs[known])
        if count := len(rows):
            named = [table.place(int(own[rows[0]])), train.place(int(known[nearest[0]]))]
            pair = f" ({' and '.join(named)})" if all(named) else ""
            compared = " compared" if len(own) < len(table) else ""
            are = f"{label} samples {'is' if count == 1 else 'are'} nearly equal to training samples"
            lines.append(
                f"{WARNING}{count:,} of {len(own):,}{compared} {are}{pair}; data.group=COLUMN keeps rows that belong "
                "together in one split"
            )
    return tuple(lines)


def near_duplicates(rows: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the places of those of `rows` [M, F] that nearly equal one of `train` [N, F], and the latter's, int64.

    Compares up to 64 columns in which no value is frequent. Returns none if there are fewer than 5, or 60 rows.
    """
    columns, count = _spaced(train.shape[1], _COLUMNS), len(train)
    ordered = train[:, columns].sort(0).values
    apart = int(_REPEATED * count)
    is_fine = (ordered[apart:] > ordered[: count - apart]).all(0)
    columns, ordered = columns[is_fine], ordered[:, is_fine]
    if count < _FEWEST_ROWS or len(columns) < _FEWEST_COLUMNS:
        return columns[:0], columns[:0]
    low, middle, high = (ordered[count * quarter // 4] for quarter in (1, 2, 3))
    values = (torch.cat([train, rows])[:, columns] - middle) / (high - low) * _NORMAL  # whatever the outliers
    # Integers and rounded numbers are equal by chance, therefore with all decimals drawn.
    steps = ordered.diff(dim=0) / (high - low) * _NORMAL
    unit = steps.where(steps > 0, math.inf).amin(0)
    draw = generator("cpu", 0)
    known, own = (values + unit * (torch.rand(values.shape, generator=draw) - 0.5)).split([count, len(rows)])
    few = known[torch.randperm(count, generator=draw)[: max(16, count // 30)]]
    found = []
    for part in own.split(_CHUNK):
        # One half of the columns is without the column that differs most: a search by each half, as matrix products.
        halves = ((part[:, i::2], known[:, i::2]) for i in (0, 1))
        nearest = torch.stack([torch.addmm(b.square().sum(1), a, b.T, alpha=-2).argmin(1) for a, b in halves], 1)
        distances, which = _distances(part, known[nearest]).min(1)
        others = _distances(part, few)
        nearest = nearest.gather(1, which[:, None]).squeeze(1)
        found.append((nearest, distances, others.amin(1), others[:, : len(few) // 3].amin(1)))
    nearest, distances, far, farther = map(torch.cat, zip(*found, strict=True))
    # The ratio of volumes (farther / far)^d has the median 2.
    inverse = math.log2(max(float((farther / far).nanmedian()), 1.0))  # 1 / d
    limit = min(_NEAREST, (_CHANCE * len(few) / count / len(rows)) ** inverse)
    differing = ((values[count:] - values[nearest]).abs() > _CLOSE).sum(1)
    is_near = (distances < limit * far) & (differing <= 1) & (rows != train[nearest]).any(1)
    indices = is_near.nonzero().squeeze(1)
    return indices, nearest[indices]


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Returns distances [B, K] of rows [B, F] to `others` [K, F] or [B, K, F], without the column that differs most."""
    squares = (rows[:, None] - others).square()
    return (squares.sum(2) - squares.amax(2)).clamp(min=0).sqrt()


def _spaced(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most)).long()
