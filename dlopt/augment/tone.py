"""Operations on values that are no affine transform of the channels: those that RandAugment adds to the colour ones,
and noise.

Tone follows PIL, as torchvision does, and rounds to whole values first.
"""

import functools
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Annotated, Self

import torch
from annotated_types import Interval
from torch import Tensor

from dlopt.augment.operation import Draws, Operation, PixelStep, Shape, Step
from dlopt.ranges import NonNegative, Probability


@dataclass
class _Tone(PixelStep):
    mask: Tensor  # [n] bool: the samples that change

    def only(self, mask: Tensor) -> Self:
        return replace(self, mask=self.mask & mask)

    def apply(self, images: Tensor) -> Tensor:
        if images.device.type == "cpu":  # elsewhere the number of chosen samples would have to be waited for
            chosen = self.mask.nonzero()[:, 0]
            return images.index_copy(0, chosen, self._rows(chosen).change(images[chosen].round()))
        return torch.where(self.mask.view(-1, 1, 1, 1), self.change(images.round()), images)

    @abstractmethod
    def change(self, images: Tensor) -> Tensor:
        """All images [n, C, H, W], float32 whole numbers 0..255, changed."""


def _everyone(draws: Draws) -> Tensor:
    return torch.ones(draws.total, dtype=torch.bool, device=draws.device)


@dataclass
class _Posterize(_Tone):
    drop: Tensor  # [n]: how many of the lowest bits to clear

    def change(self, images: Tensor) -> Tensor:
        step = torch.exp2(self.drop).view(-1, 1, 1, 1)
        return (images / step).floor() * step


class Posterize(Operation):
    """Keeps the 8 - k highest bits of each value, with k from 0 to `bits`."""

    def __init__(self, *, bits: Annotated[int, Interval(ge=0, le=8)]) -> None:
        self.bits = bits

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [_Posterize(_everyone(draws), (draws.strength() * self.bits).round())]


@dataclass
class _Solarize(_Tone):
    threshold: Tensor  # [n]

    def change(self, images: Tensor) -> Tensor:
        return torch.where(images >= self.threshold.view(-1, 1, 1, 1), 255.0 - images, images)


class Solarize(Operation):
    """Inverts all values from a threshold on, which lies between 255 * (1 - limit) and 255."""

    def __init__(self, *, limit: Probability) -> None:
        self.limit = limit

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [_Solarize(_everyone(draws), 255.0 * (1.0 - self.limit * draws.strength()))]


@dataclass
class _AutoContrast(_Tone):
    def change(self, images: Tensor) -> Tensor:
        low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
        flat = high == low
        spread = (images - torch.where(flat, 0.0, low)) * torch.where(flat, 1.0, 255.0 / (high - low))
        return spread.clamp_(max=255)


class AutoContrast(Operation):
    """Spreads each channel's values over 0..255."""

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [_AutoContrast(_everyone(draws))]


@dataclass
class _Equalize(_Tone):
    def change(self, images: Tensor) -> Tensor:
        values = images.flatten(2).long()
        counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
        counts.scatter_add_(2, values, torch.ones_like(values))
        highest = values.amax(2, keepdim=True)
        step = (values.shape[2] - counts.gather(2, highest)) // 255
        below = counts.cumsum(2) - counts
        table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
        table = torch.where(step > 0, table, torch.arange(256, device=images.device))
        return table.gather(2, values).view(images.shape).float()


class Equalize(Operation):
    """Makes each channel's histogram flat."""

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [_Equalize(_everyone(draws))]


@dataclass
class _Sharpness(_Tone):
    factor: Tensor  # [n]

    def change(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < 3:
            return images
        inner = images[:, :, 1:-1, 1:-1]
        rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
        box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        smooth = ((box + 4.0 * inner) / 13.0).round()
        out = images.clone()
        out[:, :, 1:-1, 1:-1] += (inner - smooth) * (self.factor - 1.0).view(-1, 1, 1, 1)
        return out.clamp_(0, 255)


class Sharpness(Operation):
    """Moves the inner pixels away from (or towards) their 3x3 smoothing by a factor of 1 - limit .. 1 + limit."""

    def __init__(self, *, limit: Probability) -> None:
        self.limit = limit

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [_Sharpness(_everyone(draws), 1.0 + draws.symmetric(self.limit))]


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
