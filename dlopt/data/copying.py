"""Recall of the first symbol of a sequence: a minimal task that needs long memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dlopt.data.samples import Dataset, InMemory
from dlopt.random import generator
from dlopt.ranges import Count, Natural, NonNegative

_TRAIN, _VAL, _TEST = range(3)  # RNG streams: the size of one split does not change the others


def copying(
    *,
    length: Count,
    symbols: Count,
    noise: NonNegative,
    train_size: Count,
    val_size: Natural,
    test_size: Natural,
    seed: int,
) -> Dataset:
    """Generates sequences whose first step is one of `symbols` symbols (one-hot) and whose label is that symbol.

    The other `length` - 1 steps are noise * N(0, 1), so the network must keep the symbol over them (the latching
    problem: Bengio, Simard & Frasconi 1994; Hochreiter & Schmidhuber 1997, section 5.3). Inputs float32
    [N, 1, length, symbols]: recurrent models read them row by row. A size of 0 omits a split.
    """

    def draw(size: int, split: int) -> InMemory:
        rng = generator("cpu", seed, split)
        labels = torch.randint(symbols, (size,), generator=rng)
        steps: Tensor = noise * torch.randn(size, 1, length, symbols, generator=rng)
        steps[:, 0, 0] = F.one_hot(labels, symbols).float()
        return InMemory(steps, labels)

    val = draw(val_size, _VAL) if val_size else None
    test = draw(test_size, _TEST) if test_size else None
    return Dataset(draw(train_size, _TRAIN), val, test, classes=tuple(map(str, range(symbols))))
