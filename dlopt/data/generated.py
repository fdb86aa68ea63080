"""Generated data: minimal tasks for one purpose each.

`polynomial` shows overfitting and capacity, `linear` why features are scaled; `copying` and `recall` need long memory.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Unpack

import torch
from annotated_types import MinLen
from torch import Tensor
from torch.nn import functional as F

from dlopt.basics.ranges import INCREASING, Count, Natural, NonNegative
from dlopt.data.samples import Dataset, InMemory, SplitKeys, generated

Function = Literal["sine", "runge", "cubic", "step"]
Span = Annotated[tuple[float, float], INCREASING]

FUNCTIONS: Mapping[Function, Callable[[Tensor], Tensor]] = {
    "sine": lambda x: torch.sin(math.pi * x),
    "runge": lambda x: 1 / (1 + 25 * x**2),  # Runge 1901: interpolation at evenly spaced points diverges
    "cubic": lambda x: (5 * x**3 - 3 * x) / 2,  # Legendre polynomial, within [-1, 1]
    "step": torch.sign,
}


def polynomial(*, function: Function, interval: Span, noise: NonNegative, **keys: Unpack[SplitKeys]) -> Dataset:
    """Samples y = f(x) + noise * N(0, 1) for x uniform in `interval`: inputs float32 [N, 1], targets float32 [N].

    The lowest expected loss (mean squared error) is noise^2 on every split. A size of 0 omits a split.
    """
    low, high = interval

    def draw(size: int, rng: torch.Generator) -> InMemory:
        x = low + (high - low) * torch.rand(size, generator=rng, dtype=torch.float64)
        y = FUNCTIONS[function](x) + noise * torch.randn(size, generator=rng, dtype=torch.float64)
        return InMemory(x.float().unsqueeze(1), y.float())

    return generated(draw, **keys)


def drawn(*, train_size: Count, val_size: Natural, test_size: Natural) -> Dataset:
    """Returns samples without content, for tasks that draw the points of a batch themselves: inputs float32 [N, 1]."""

    def draw(size: int, rng: torch.Generator) -> InMemory:
        return InMemory(torch.zeros(size, 1), torch.zeros(size))

    return generated(draw, train_size=train_size, val_size=val_size, test_size=test_size, seed=0)


def linear(
    *, intervals: Annotated[tuple[Span, ...], MinLen(1)], noise: NonNegative, **keys: Unpack[SplitKeys]
) -> Dataset:
    """Samples y = sum_i u_i + noise * N(0, 1), where u_i in -1..1 is the position of feature x_i in its interval.

    Features are uniform and independent; every feature is equally important, whatever its range. Inputs float32 [N, F],
    targets float32 [N]. The lowest expected loss (mean squared error) is noise^2. A size of 0 omits a split.
    """
    lows, highs = torch.tensor(intervals, dtype=torch.float64).unbind(1)

    def draw(size: int, rng: torch.Generator) -> InMemory:
        u = 2 * torch.rand(size, len(intervals), generator=rng, dtype=torch.float64) - 1
        y = u.sum(1) + noise * torch.randn(size, generator=rng, dtype=torch.float64)
        return InMemory((lows + (highs - lows) * (u + 1) / 2).float(), y.float())

    return generated(draw, **keys)


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
    """Generates sequences of random symbols with one marked symbol, which is the label.

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
