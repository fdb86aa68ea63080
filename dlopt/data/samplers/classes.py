"""Samplers that look at the classes."""

import torch
from torch import Tensor

from dlopt.errors import UserError
from dlopt.random import generator

_ROUNDS = 8  # of insertion at random places, before what is left is inserted class by class


class ClassBalanced:
    """Every class equally often, whatever its size; an epoch has as many draws as there are samples.

    The samples of a class take turns: over the run each of them is drawn as often as the others of its class, give or
    take one. Each stretch of K draws, counted from an epoch's start, holds each of the K classes once.
    """

    def __init__(self, *, targets: Tensor, seed: int) -> None:
        labels = class_labels(targets, "class_balanced")
        self._count = len(labels)
        self._members = labels.argsort(stable=True).split(labels.bincount().tolist())
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def order(self, epoch: int) -> Tensor:
        classes = len(self._members)
        drawn, rounds = [], []
        for label, members in enumerate(self._members):
            # Draw number s of the whole run is one of class s mod K.
            start, stop = (-(-(e * self._count - label) // classes) for e in (epoch, epoch + 1))
            drawn.append(members[self._turns(label, len(members), start, stop)])
            rounds.append(torch.arange(stop - start))
        jitter = torch.rand(self._count, generator=generator("cpu", self._seed, epoch), dtype=torch.float64)
        return torch.cat(drawn)[(torch.cat(rounds) + jitter).argsort()]

    def _turns(self, label: int, size: int, start: int, stop: int) -> Tensor:
        """Elements start..stop of an endless row of permutations of `size` members."""
        first, last = start // size, (stop - 1) // size
        turns = [
            torch.randperm(size, generator=generator("cpu", self._seed, label, turn, 0))
            for turn in range(first, last + 1)
        ]
        return torch.cat(turns)[start - first * size : stop - first * size]


class ClassSorted:
    """Every sample once, class after class, in a random order within each: what the shuffling is there to prevent."""

    def __init__(self, *, targets: Tensor, seed: int) -> None:
        self._labels = class_labels(targets, "class_sorted")
        self._seed = seed

    def __len__(self) -> int:
        return len(self._labels)

    def order(self, epoch: int) -> Tensor:
        order = torch.randperm(len(self._labels), generator=generator("cpu", self._seed, epoch))
        return order[self._labels[order].argsort(stable=True)]


class ClassInterleaved:
    """Every sample once, in a random order in which successive samples are of different classes.

    Where one class has more than half of the samples (rounded up), as few of its samples as possible follow each
    other, and the others are spread evenly among them.
    """

    def __init__(self, *, targets: Tensor, seed: int) -> None:
        self._labels = class_labels(targets, "class_interleaved")
        self._seed = seed

    def __len__(self) -> int:
        return len(self._labels)

    def order(self, epoch: int) -> Tensor:
        return _interleave(self._labels, generator("cpu", self._seed, epoch))


def class_labels(targets: Tensor, choice: str) -> Tensor:
    """Class indices without gaps. Raises `UserError` in a regression."""
    if targets.is_floating_point():
        raise UserError(f"sampler={choice}: the targets are numbers, not classes; use sampler=random")
    return targets.cpu().unique(return_inverse=True)[1]


def _interleave(labels: Tensor, draws: torch.Generator) -> Tensor:
    """Indices in a random order with as few equal neighbours as possible.

    A random order is thinned until no neighbours are equal, and what was taken out is inserted at random places where
    it differs from both neighbours. A large class would find no such places: it is left out of the thinning and put
    between the equal neighbours of the others instead.
    """
    order = torch.randperm(len(labels), generator=draws)
    counts = labels.bincount()
    large = int(counts.argmax())
    if 4 * int(counts[large]) <= len(labels):
        twins = _equal_gaps(labels[order])
        return _insert_all(labels, *_take_out(order, twins), draws)
    is_large = labels[order] == large
    base, separators = order[~is_large], order[is_large]
    if len(separators) > len(base) + 1:
        gaps = 1 + torch.randperm(len(separators) - 1, generator=draws)[: len(base)]
        return _insert(separators, base, gaps)
    twins = _equal_gaps(labels[base])
    twins = twins[torch.randperm(len(twins), generator=draws)]
    base, pending = _take_out(base, twins[len(separators) :])
    gaps = torch.randperm(len(base) + 1, generator=draws)
    twin = torch.zeros(len(base) + 1, dtype=torch.bool)
    twin[_equal_gaps(labels[base])] = True
    gaps = torch.cat([gaps[twin[gaps]], gaps[~twin[gaps]]])[: len(separators)]
    return _insert_all(labels, _insert(base, separators, gaps), pending, draws)


def _equal_gaps(row: Tensor) -> Tensor:
    """The places i at which row[i - 1] == row[i]. Place i lies before element i."""
    return 1 + (row[1:] == row[:-1]).nonzero().flatten()


def _take_out(row: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """What is left, and what was taken out."""
    out = torch.zeros(len(row), dtype=torch.bool)
    out[places] = True
    return row[~out], row[out]


def _insert(row: Tensor, items: Tensor, gaps: Tensor) -> Tensor:
    """`row` with items[i] before the element gaps[i]; all gaps differ."""
    return torch.cat([row, items])[torch.cat([2 * torch.arange(len(row)) + 1, 2 * gaps]).argsort()]


def _insert_all(labels: Tensor, row: Tensor, pending: Tensor, draws: torch.Generator) -> Tensor:
    """`row`, which has no equal neighbours, with `pending` inserted so that there are none.

    There is always a place as long as no class has more than half (rounded up) of everything. Suppose there is none.
    An end of the row rejects only its own class, so everything pending is of one class c, and both ends are c; no gap
    lies between two others, so c is every second element of the row, and the pending ones make it too large.
    """
    for _ in range(_ROUNDS):
        gaps = torch.randperm(len(row) + 1, generator=draws)[: len(pending)]
        tried, rest = pending[: len(gaps)], pending[len(gaps) :]
        left, right = _neighbours(labels[row])
        fits = (left[gaps] != labels[tried]) & (right[gaps] != labels[tried])
        row, pending = _insert(row, tried[fits], gaps[fits]), torch.cat([tried[~fits], rest])
        if not len(pending):
            break
    while len(pending):
        for label in labels[pending].unique().tolist():
            left, right = _neighbours(labels[row])
            places = ((left != label) & (right != label)).nonzero().flatten()
            places = places[torch.randperm(len(places), generator=draws)]
            own = labels[pending] == label
            items, others = pending[own], pending[~own]
            count = min(len(items), len(places))
            row, pending = _insert(row, items[:count], places[:count]), torch.cat([others, items[count:]])
    return row


def _neighbours(row: Tensor) -> tuple[Tensor, Tensor]:
    """The labels on both sides of each gap; -1 outside."""
    nothing = row.new_full((1,), -1)
    return torch.cat([nothing, row]), torch.cat([row, nothing])
