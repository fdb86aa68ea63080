"""Recall of one symbol of a sequence: minimal tasks that need long memory."""

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from dlopt.data.samples import Dataset, InMemory, SplitKeys, generated
from dlopt.ranges import Count, NonNegative


def copying(*, length: Count, symbols: Count, noise: NonNegative, **keys: Unpack[SplitKeys]) -> Dataset:
    """Generates sequences whose first step is one of `symbols` symbols (one-hot) and whose label is that symbol.

    The other `length` - 1 steps are noise * N(0, 1), so the network must keep the symbol over them (the latching
    problem: Bengio, Simard & Frasconi 1994; Hochreiter & Schmidhuber 1997, section 5.3). Inputs float32
    [N, 1, length, symbols]: recurrent models read them row by row. A size of 0 omits a split.
    """

    def draw(size: int, rng: torch.Generator) -> InMemory:
        labels = torch.randint(symbols, (size,), generator=rng)
        steps: Tensor = noise * torch.randn(size, 1, length, symbols, generator=rng)
        steps[:, 0, 0] = F.one_hot(labels, symbols).float()
        return InMemory(steps, labels)

    return generated(draw, tuple(map(str, range(symbols))), **keys)


def recall(*, length: Count, symbols: Count, **keys: Unpack[SplitKeys]) -> Dataset:
    """Generates sequences of random symbols, one of which is marked; the label is the marked symbol.

    The mark is in the first quarter. The network must store a symbol when it sees the mark, and must not overwrite it
    with the symbols that follow, as in the adding problem (Hochreiter & Schmidhuber 1997, section 5.4), but with
    classes. Inputs float32 [N, 1, length, symbols + 1]: one-hot symbols and the mark. A size of 0 omits a split.
    """

    def draw(size: int, rng: torch.Generator) -> InMemory:
        sequence = torch.randint(symbols, (size, length), generator=rng)
        marked = torch.randint(max(length // 4, 1), (size,), generator=rng)
        rows = torch.arange(size)
        steps = torch.zeros(size, 1, length, symbols + 1)
        steps[:, 0, :, :symbols] = F.one_hot(sequence, symbols).float()
        steps[rows, 0, marked, symbols] = 1
        return InMemory(steps, sequence[rows, marked])

    return generated(draw, tuple(map(str, range(symbols))), **keys)
