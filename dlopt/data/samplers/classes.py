"""Samplers based on the classes."""

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator

_ROUNDS = 8  # of insertion at random positions; the remaining samples are then inserted class by class


class _LabelSampler:
    _choice: str

    def __init__(self, *, targets: Tensor, seed: int) -> None:
        if targets.is_floating_point():
            raise UserError(f"sampler={self._choice}: the targets are numbers, not classes; use sampler=random")
        self._labels = targets.cpu().unique(return_inverse=True)[1]  # class indices without gaps
        self._seed = seed

    def __len__(self) -> int:
        return len(self._labels)


class ClassBalanced(_LabelSampler):
    """Draws every class equally often, whatever its size; an epoch has as many draws as there are samples.

    Within a class, samples are drawn in rotation: over the run their counts differ by at most one. Each block of K
    draws, counted from the epoch's start, has each of the K classes once.
    """

    _choice = "class_balanced"

    def __init__(self, *, targets: Tensor, seed: int) -> None:
        super().__init__(targets=targets, seed=seed)
        self._members = self._labels.argsort(stable=True).split(self._labels.bincount().tolist())

    def order(self, epoch: int) -> Tensor:
        count, classes = len(self), len(self._members)
        indices, blocks = [], []
        for label, members in enumerate(self._members):
            # Draw s of the whole run has class s mod K: these are the class's draws that fall into this epoch.
            start, stop = (-(-(e * count - label) // classes) for e in (epoch, epoch + 1))
            indices.append(members[self._rotation(label, len(members), start, stop)])
            blocks.append(torch.arange(stop - start))
        jitter = torch.rand(count, generator=generator("cpu", self._seed, epoch), dtype=torch.float64)
        return torch.cat(indices)[(torch.cat(blocks) + jitter).argsort()]

    def _rotation(self, label: int, size: int, start: int, stop: int) -> Tensor:
        """Returns elements start..stop of an endless sequence of permutations of `size` members."""
        first, last = start // size, (stop - 1) // size
        permutations = [
            torch.randperm(size, generator=generator("cpu", self._seed, label, number, 0))
            for number in range(first, last + 1)
        ]
        return torch.cat(permutations)[start - first * size : stop - first * size]


class ClassSorted(_LabelSampler):
    """Visits every sample once, class after class, shuffled within each: shows why shuffling matters."""

    _choice = "class_sorted"

    def order(self, epoch: int) -> Tensor:
        order = torch.randperm(len(self._labels), generator=generator("cpu", self._seed, epoch))
        return order[self._labels[order].argsort(stable=True)]


class ClassInterleaved(_LabelSampler):
    """Visits every sample once, in a random order in which successive samples have different classes.

    If one class has more than half of the samples (rounded up), as few of its samples as possible follow each other,
    and the other samples are spread evenly among them.
    """

    _choice = "class_interleaved"

    def order(self, epoch: int) -> Tensor:
        return _interleave(self._labels, generator("cpu", self._seed, epoch))


def _interleave(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Returns all indices in a random order with as few adjacent samples of the same class as possible.

    Starts from a random order and removes samples until no neighbours are equal, then inserts the removed samples at
    random positions where they differ from both neighbours. A large class would find too few such positions: it is set
    aside first and separates the equal neighbours of the other classes instead.
    """
    order = torch.randperm(len(labels), generator=rng)
    counts = labels.bincount()
    large = int(counts.argmax())
    if 4 * int(counts[large]) <= len(labels):
        return _insert_all(labels, *_remove(order, _equal_gaps(labels[order])), rng)
    is_large = labels[order] == large
    base, separators = order[~is_large], order[is_large]
    if len(separators) > len(base) + 1:
        gaps = 1 + torch.randperm(len(separators) - 1, generator=rng)[: len(base)]
        return _insert(separators, base, gaps)
    equal_gaps = _equal_gaps(labels[base])
    equal_gaps = equal_gaps[torch.randperm(len(equal_gaps), generator=rng)]
    base, pending = _remove(base, equal_gaps[len(separators) :])
    gaps = torch.randperm(len(base) + 1, generator=rng)
    is_equal = torch.zeros_like(gaps, dtype=torch.bool)
    is_equal[_equal_gaps(labels[base])] = True
    gaps = torch.cat([gaps[is_equal[gaps]], gaps[~is_equal[gaps]]])[: len(separators)]  # equal neighbours first
    return _insert_all(labels, _insert(base, separators, gaps), pending, rng)


def _equal_gaps(row: Tensor) -> Tensor:
    """Returns the gaps i with row[i - 1] == row[i]. Gap i is before element i."""
    return 1 + (row[1:] == row[:-1]).nonzero().flatten()


def _remove(row: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (remaining, removed) elements."""
    removed = torch.zeros(len(row), dtype=torch.bool)
    removed[positions] = True
    return row[~removed], row[removed]


def _insert(row: Tensor, items: Tensor, gaps: Tensor) -> Tensor:
    """Inserts items[i] at gaps[i] of `row`; all gaps differ."""
    return torch.cat([row, items])[torch.cat([2 * torch.arange(len(row)) + 1, 2 * gaps]).argsort()]


def _insert_all(labels: Tensor, row: Tensor, pending: Tensor, rng: torch.Generator) -> Tensor:
    """Inserts all `pending` samples into `row`, which has no equal neighbours, without creating equal neighbours.

    A valid gap always exists as long as no class has more than half (rounded up) of all samples. Suppose none does. An
    end of the row rejects only its own class, so all pending samples have one class c, and both ends are c. No gap is
    between two other classes, so c is every second element of the row, and with the pending ones it is too large.
    """
    for _ in range(_ROUNDS):
        gaps = torch.randperm(len(row) + 1, generator=rng)[: len(pending)]
        items, rest = pending[: len(gaps)], pending[len(gaps) :]
        left, right = _neighbours(labels[row])
        fits = (left[gaps] != labels[items]) & (right[gaps] != labels[items])
        row, pending = _insert(row, items[fits], gaps[fits]), torch.cat([items[~fits], rest])
        if not len(pending):
            break
    while len(pending):
        for label in labels[pending].unique().tolist():
            left, right = _neighbours(labels[row])
            gaps = ((left != label) & (right != label)).nonzero().flatten()
            gaps = gaps[torch.randperm(len(gaps), generator=rng)]
            of_class = labels[pending] == label
            items, others = pending[of_class], pending[~of_class]
            count = min(len(items), len(gaps))
            row, pending = _insert(row, items[:count], gaps[:count]), torch.cat([others, items[count:]])
    return row


def _neighbours(row: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the labels to the left and right of each gap; -1 beyond the ends."""
    end = row.new_full((1,), -1)
    return torch.cat([end, row]), torch.cat([row, end])
