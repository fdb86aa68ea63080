"""Samples of a linear function of features with different ranges: shows why features are scaled."""

from typing import Unpack

import torch

from dlopt.data.samples import Dataset, InMemory, SplitKeys, generated
from dlopt.errors import UserError
from dlopt.ranges import NonNegative


def linear(*, intervals: tuple[tuple[float, float], ...], noise: NonNegative, **keys: Unpack[SplitKeys]) -> Dataset:
    """Samples y = sum_i u_i + noise * N(0, 1), where u_i in -1..1 is the position of feature x_i in its interval.

    Features are uniform and independent; every feature is equally important, whatever its range. Inputs float32 [N, F],
    targets float32 [N]. The lowest expected loss (mean squared error) is noise^2. A size of 0 omits a split.

    Raises:
        UserError: an interval is empty, or there is none.
    """
    for low, high in intervals:
        if low >= high:
            raise UserError(f"data.intervals: [{low},{high}] is empty; use [low,high] with low < high")
    if not intervals:
        raise UserError("data.intervals=[]: needs the interval of at least one feature: [[1,2],[100,200]]")
    lows, highs = torch.tensor(intervals, dtype=torch.float64).unbind(1)

    def draw(size: int, rng: torch.Generator) -> InMemory:
        u = 2 * torch.rand(size, len(intervals), generator=rng, dtype=torch.float64) - 1
        y = u.sum(1) + noise * torch.randn(size, generator=rng, dtype=torch.float64)
        return InMemory((lows + (highs - lows) * (u + 1) / 2).float(), y.float())

    return generated(draw, **keys)
