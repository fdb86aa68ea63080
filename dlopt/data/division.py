"""Divides samples: a subset, a validation set, a test set."""

import math

import torch
from torch import Tensor

from dlopt.basics.random import generator


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
