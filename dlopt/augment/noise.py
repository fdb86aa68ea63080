"""Noise on pixels."""

import functools
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from dlopt.augment.operation import Draws, Operation, PixelStep, Shape, Step
from dlopt.ranges import NonNegative


@dataclass
class _Noise(PixelStep):
    std: Tensor  # [n]
    draws: Draws
    part: slice = field(default_factory=lambda: slice(None))

    phase = 1

    def take(self, part: slice) -> Self:
        return replace(self, std=self.std[part], part=part)

    def only(self, mask: Tensor) -> Self:
        return replace(self, std=self.std * mask)

    def apply(self, images: Tensor) -> Tensor:
        shape = (self.draws.total, *images.shape[1:])
        normal = normals(shape, self.draws.generator)[self.part]
        return torch.addcmul(images, normal, self.std.view(-1, 1, 1, 1), out=normal).clamp_(0, 255)


class GaussianNoise(Operation):
    """Adds to each value its own normal number; the standard deviation is per image, uniform in 0..`std` (of 255)."""

    def __init__(self, *, std: NonNegative) -> None:
        self.std = std

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [_Noise(draws.strength() * self.std, draws)]


def normals(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float32 of that shape from the standard normal distribution.

    On a CPU four neighbours come from a table of 2^16 fours of normal numbers, looked up by 16 random bits, in a fifth
    of torch.randn's time. Each number's distribution function is right within 2^-17, the largest is 4.3. Fours are
    independent of each other; within one the numbers are uncorrelated (within 2^-8), and three of them tell the fourth.
    """
    if generator.device.type != "cpu":
        return torch.randn(shape, generator=generator, device=generator.device)
    count = torch.Size(shape).numel()
    fours = -(-count // _FOUR)
    bits = torch.empty(-(-fours // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    places = bits.view(torch.int16)[:fours].int().add_(2**15)
    return _fours().index_select(0, places).view(torch.float32)[:count].view(shape)


_FOUR = 4


@functools.cache
def _fours() -> Tensor:
    """[2^16]: in each of the columns the quantiles of as many equal shares, in an order of its own.

    Four float32 lie in the room of a complex128: single values are copied in a quarter of the time of rows.
    """
    middle = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    quantiles = torch.special.ndtri(middle).float()
    orders = torch.Generator().manual_seed(0)
    columns = [quantiles[torch.randperm(2**16, generator=orders)] for _ in range(_FOUR)]
    return torch.stack(columns, 1).view(torch.complex128).view(-1)
