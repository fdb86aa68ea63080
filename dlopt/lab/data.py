"""Data sets of lecture recipes, which set them by `data._target_`."""

from dataclasses import replace
from typing import Literal, Unpack

import torch

from dlopt.basics.random import generator
from dlopt.data.division import stratified
from dlopt.data.generated import Function, polynomial
from dlopt.data.images.digits import digits
from dlopt.data.samples import SplitKeys
from dlopt.extend import Count, Dataset, NonNegative, Seed, UserError

_VAL_SEED = 1
Digit = Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def unrepresentative_digits(
    *, train_size: Count, val_size: Count, rare: list[Digit], fraction: NonNegative, draw_seed: Seed
) -> Dataset:
    """Draws `train_size` of the digits: the classes `rare` have `fraction` times as many samples as the others.

    A fraction of 1 gives a representative set, 0 leaves the classes out; the size of the set does not depend on it. The
    validation set is always the same: `val_size` other digits, stratified.

    Raises:
        UserError: more samples of a class are needed than there are.
    """
    dataset = digits()
    held_out, kept = stratified(dataset.train.targets, val_size, _VAL_SEED)
    val, pool = dataset.train.select(held_out), dataset.train.select(kept)
    weights = [fraction if digit in rare else 1.0 for digit in range(10)]
    ends = [round(train_size * sum(weights[: digit + 1]) / max(sum(weights), 1e-9)) for digit in range(10)]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    order = torch.randperm(len(pool), generator=generator("cpu", draw_seed))
    chosen = []
    for digit, count in enumerate(counts):
        of_class = order[pool.targets[order] == digit]
        if count > len(of_class):
            raise UserError(
                f"data.train_size={train_size}: needs {count} digits {digit}, of which there are {len(of_class)}; "
                "use fewer"
            )
        chosen.append(of_class[:count])
    return replace(dataset, train=pool.select(torch.cat(chosen).sort().values), val=val)


def unrepresentative_curve(
    *,
    covered: tuple[float, float],
    function: Function,
    interval: tuple[float, float],
    noise: NonNegative,
    **keys: Unpack[SplitKeys],
) -> Dataset:
    """Samples a function as `polynomial` does: for training from the interval `covered`, for validation and test from
    all of `interval`.

    Raises:
        UserError: an interval is empty, or `covered` is not a part of `interval`.
    """
    if not interval[0] <= covered[0] < covered[1] <= interval[1]:
        raise UserError(f"data.covered={list(covered)}: must be a part of data.interval={list(interval)}")
    whole = polynomial(function=function, interval=interval, noise=noise, **keys)
    return replace(whole, train=polynomial(function=function, interval=covered, noise=noise, **keys).train)
