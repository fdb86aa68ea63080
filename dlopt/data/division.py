"""Divides samples: a subset, a validation set, a test set."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator

GROUP, ORDER = "group", "order"
"""Further tensors of samples: int64 [N], equal for samples that stay together; float64 [N], such as a time."""


def divide(
    targets: Tensor, further: Mapping[str, Tensor], count: int, seed: int, *counters: int, keep_one: bool = False
) -> tuple[Tensor, Tensor]:
    """Selects about `count` samples; returns (selected, rest), ascending indices.

    With an order the last ones, with groups whole groups, and otherwise the samples that `split` selects. Raises
    `UserError` if neither part can have a sample.
    """
    if ORDER in further:
        return ordered(further[ORDER], count)
    if GROUP in further:
        classes = torch.zeros(len(targets)) if targets.is_floating_point() else targets
        return grouped(classes, further[GROUP], count, seed, *counters)
    return split(targets, count, seed, *counters, keep_one=keep_one)


def ordered(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Selects the last samples by `values` [N], about `count`: equal values stay on one side.

    Raises `UserError` if all values are equal.
    """
    ascending, positions = values.sort(stable=True)
    cuts = (ascending[1:] != ascending[:-1]).nonzero().squeeze(1) + 1  # between different values
    if count == len(values):
        cuts = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
    if not len(cuts):
        raise UserError(f"data.order: all {len(values):,} samples have one value; nothing divides them")
    cut = int(cuts[(cuts - (len(values) - count)).abs().argmin()])
    return positions[cut:].sort().values, positions[:cut].sort().values


def grouped(classes: Tensor, groups: Tensor, count: int, seed: int, *counters: int) -> tuple[Tensor, Tensor]:
    """Selects whole groups with about `count` samples, and as far as groups allow with the proportions of `classes`.

    The groups are dealt from the largest to the smallest, each to the part that lacks most of its samples, as
    scikit-learn's StratifiedGroupKFold does. Those with all samples of a class stay in the rest. `classes`, `groups`:
    int64 [N]. Raises `UserError` for a single group.
    """
    _, members = groups.unique(return_inverse=True)
    _, labels = classes.unique(return_inverse=True)
    total, kinds = int(members.max()) + 1, int(labels.max()) + 1
    if count == len(groups):
        return torch.arange(len(groups)), torch.arange(0)
    if total < 2:
        raise UserError("data.group: all samples are of one group; at least two are needed to divide them")
    counts = _counts(members, labels)
    of_class = counts.sum(0)
    shares = np.array([count / len(groups), 1 - count / len(groups)])
    order = torch.randperm(total, generator=generator("cpu", seed, *counters)).numpy()
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    dealt, selected = np.zeros((2, kinds)), np.zeros(total, dtype=bool)
    has_whole_class = (counts == of_class).any(1) if kinds > 1 else np.zeros(total, dtype=bool)
    for group in order:
        rise = _rise(dealt, counts[group], of_class) / shares
        has_room = dealt[0].sum() + counts[group].sum() / 2 <= count  # with it the count is nearer
        selected[group] = rise[0] < rise[1] and has_room and not has_whole_class[group]
        dealt[0 if selected[group] else 1] += counts[group]
    if not selected.any() or selected.all():  # a part needs a group: the smallest one
        smallest = next((group for group in order[::-1] if not has_whole_class[group]), order[-1])
        selected[smallest] = not selected.any()
    chosen = torch.from_numpy(selected)[members]
    return chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)


def partition(targets: Tensor, further: Mapping[str, Tensor], folds: int, seed: int) -> Tensor:
    """Returns the part of each sample for cross-validation, int64 [N], 0 .. `folds` - 1.

    Sizes of parts differ by at most 1, and so do the samples that they have of a class. With groups, whole ones are
    dealt from the largest to the smallest, each to the part that lacks most of its samples. Raises `UserError` for
    fewer samples or groups than parts.
    """
    classes = torch.zeros(len(targets), dtype=torch.int64) if targets.is_floating_point() else targets
    _, labels = classes.unique(return_inverse=True)
    members = further[GROUP].unique(return_inverse=True)[1] if GROUP in further else torch.arange(len(targets))
    total = int(members.max()) + 1
    if total < folds:
        units = "groups (data.group)" if GROUP in further else "samples"
        raise UserError(f"data.folds={folds}: the training set has only {total} {units}; use at most {total}")
    order = torch.randperm(total, generator=generator("cpu", seed))
    parts = torch.empty(total, dtype=torch.int64)
    if GROUP not in further:  # class by class, shuffled within each
        parts[order[labels[order].argsort(stable=True)]] = torch.arange(total) % folds
        return parts
    counts = _counts(members, labels)
    of_class, dealt = counts.sum(0), np.zeros((folds, counts.shape[1]))
    for group in order[np.argsort(-counts[order].sum(1), kind="stable")].tolist():
        rise = _rise(dealt, counts[group], of_class)
        part = np.lexsort((dealt.sum(1), rise))[0]  # of equal ones the smallest part, so that none stays empty
        parts[group] = int(part)
        dealt[part] += counts[group]
    return parts[members]


def _counts(members: Tensor, labels: Tensor) -> np.ndarray:
    """Returns the samples of each group and class, [G, K]."""
    total, kinds = int(members.max()) + 1, int(labels.max()) + 1
    counts: np.ndarray = np.bincount((members * kinds + labels).numpy(), minlength=total * kinds)
    return counts.reshape(total, kinds)


def _rise(dealt: np.ndarray, group: np.ndarray, of_class: np.ndarray) -> np.ndarray:
    """Returns what a group [K] adds to the imbalance if a part gets it, for parts of one size that have `dealt` [P, K].

    The imbalance is the sum over parts and classes of share * (dealt / wanted - 1)^2; what all parts have in common is
    left out.
    """
    rise: np.ndarray = ((2 * dealt + group) * group / of_class**2).sum(1)
    return rise


def split(targets: Tensor, count: int, seed: int, *counters: int, keep_one: bool = False) -> tuple[Tensor, Tensor]:
    """Calls `stratified` on the classes; ignores the values of continuous targets."""
    if targets.is_floating_point():
        targets = torch.zeros(len(targets), dtype=torch.int64)
    return stratified(targets, count, seed, *counters, keep_one=keep_one)


def stratified(targets: Tensor, count: int, seed: int, *counters: int, keep_one: bool = False) -> tuple[Tensor, Tensor]:
    """Selects `count` samples with the class proportions of `targets` [N]; returns (selected, rest), ascending indices.

    Every class gets its exact proportion, rounded by largest remainders, but at least one sample; with many small
    classes more than `count` samples may be selected. `keep_one`: the rest also keeps at least one sample of each
    class, and the only sample of a class stays in the rest.
    """
    _, classes = targets.unique(return_inverse=True)
    available = torch.bincount(classes).tolist()
    quotas = _allocate(available, count, keep_one)
    order = torch.randperm(len(targets), generator=generator("cpu", seed, *counters))
    grouped = order[classes[order].argsort(stable=True)]  # class by class, shuffled within each
    selected = torch.zeros(len(targets), dtype=torch.bool)
    start = 0
    for quota, total in zip(quotas, available, strict=True):
        selected[grouped[start : start + quota]] = True
        start += total
    return selected.nonzero().squeeze(1), (~selected).nonzero().squeeze(1)


def _allocate(available: list[int], count: int, keep_one: bool) -> list[int]:
    """Distributes `count` over the classes by largest remainders, with at least 1 (if possible) of each class."""
    upper = [total - 1 for total in available] if keep_one else available
    lower = [min(1, limit) if count > 0 else 0 for limit in upper]
    exact = [count * total / sum(available) for total in available]
    result = [min(max(math.floor(quota), low), high) for quota, low, high in zip(exact, lower, upper, strict=True)]
    while sum(result) != count:
        step = 1 if sum(result) < count else -1
        bound = upper if step > 0 else lower
        adjustable = [i for i in range(len(result)) if result[i] != bound[i]]
        if not adjustable:
            break
        # Ties go to the first class, so that the result depends only on the counts.
        best = max(adjustable, key=lambda i: (step * (exact[i] - result[i]), -i))
        result[best] += step
    return result
