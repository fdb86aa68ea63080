"""Noisy samples of a function of one variable: a minimal regression task to show overfitting and capacity."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, Unpack

import torch
from torch import Tensor

from dlopt.data.samples import Dataset, InMemory, SplitKeys, generated
from dlopt.errors import UserError
from dlopt.ranges import NonNegative

Function = Literal["sine", "runge", "cubic", "step"]

FUNCTIONS: Mapping[Function, Callable[[Tensor], Tensor]] = {
    "sine": lambda x: torch.sin(math.pi * x),
    "runge": lambda x: 1 / (1 + 25 * x**2),  # Runge 1901: interpolation at evenly spaced points diverges
    "cubic": lambda x: (5 * x**3 - 3 * x) / 2,  # Legendre polynomial, within [-1, 1]
    "step": torch.sign,
}


def polynomial(
    *, function: Function, interval: tuple[float, float], noise: NonNegative, **keys: Unpack[SplitKeys]
) -> Dataset:
    """Samples y = f(x) + noise * N(0, 1) for x uniform in `interval`: inputs float32 [N, 1], targets float32 [N].

    The lowest expected loss (mean squared error) is noise^2 on every split. A size of 0 omits a split.

    Raises:
        UserError: the interval is empty.
    """
    low, high = interval
    if low >= high:
        raise UserError(f"data.interval={list(interval)}: is empty; use [low,high] with low < high")

    def draw(size: int, rng: torch.Generator) -> InMemory:
        x = low + (high - low) * torch.rand(size, generator=rng, dtype=torch.float64)
        y = FUNCTIONS[function](x) + noise * torch.randn(size, generator=rng, dtype=torch.float64)
        return InMemory(x.float().unsqueeze(1), y.float())

    return generated(draw, **keys)
