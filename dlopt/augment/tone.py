"""Operations on pixel values that are not affine in the channels: RandAugment's tone operations, and noise.

Tone operations follow PIL, as torchvision's do, and round to whole values first.
"""

import functools
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Annotated, Self

import torch
from annotated_types import Interval
from torch import Tensor

from dlopt.augment.colour import FactorOperation
from dlopt.augment.operation import DrawnStep, Draws, Operation, PixelStep, Shape
from dlopt.basics.ranges import NonNegative, Probability


class ToneOperation(Operation):
    """Base of operations on whole values 0..255."""

    in_grey_levels = True

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        mask = torch.ones(draws.total, dtype=torch.bool, device=draws.device)
        return [_Tone(mask, self.amounts(draws), self)]

    def amounts(self, draws: Draws) -> Tensor:
        """Draws [n] parameters; none by default."""
        return torch.zeros(draws.total, device=draws.device)

    @abstractmethod
    def change(self, images: Tensor, amounts: Tensor) -> Tensor:
        """Transforms all images [n, C, H, W], float32 with whole values 0..255, by the amounts [n, 1, 1, 1]."""


@dataclass
class _Tone(PixelStep):
    mask: Tensor  # [n] bool: the samples that change
    amounts: Tensor  # [n]
    operation: ToneOperation

    def masked(self, mask: Tensor) -> Self:
        return replace(self, mask=self.mask & mask)

    def apply(self, images: Tensor) -> Tensor:
        amounts = self.amounts.view(-1, 1, 1, 1)
        if images.device.type == "cpu":  # on a GPU, nonzero() would synchronize; computing all images is faster
            selected = self.mask.nonzero()[:, 0]
            changed = self.operation.change(images[selected].round(), amounts[selected])
            return images.index_copy(0, selected, changed)
        return torch.where(self.mask.view(-1, 1, 1, 1), self.operation.change(images.round(), amounts), images)


class Posterize(ToneOperation):
    """Keeps the 8 - k highest bits of each value, with k from 0 to `bits`."""

    def __init__(self, *, bits: Annotated[int, Interval(ge=0, le=8)]) -> None:
        self.bits = bits

    def amounts(self, draws: Draws) -> Tensor:
        return (draws.strength() * self.bits).round()

    def change(self, images: Tensor, amounts: Tensor) -> Tensor:
        step = torch.exp2(amounts)
        return (images / step).floor() * step


class Solarize(ToneOperation):
    """Inverts all values at or above a threshold between 255 * (1 - limit) and 255."""

    def __init__(self, *, limit: Probability) -> None:
        self.limit = limit

    def amounts(self, draws: Draws) -> Tensor:
        return 255.0 * (1.0 - self.limit * draws.strength())

    def change(self, images: Tensor, amounts: Tensor) -> Tensor:
        return torch.where(images >= amounts, 255.0 - images, images)


class AutoContrast(ToneOperation):
    """Stretches the values of each channel to 0..255."""

    def change(self, images: Tensor, amounts: Tensor) -> Tensor:
        low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
        flat = high == low
        stretched = (images - torch.where(flat, 0.0, low)) * torch.where(flat, 1.0, 255.0 / (high - low))
        return stretched.clamp_(max=255)


class Equalize(ToneOperation):
    """Equalizes the histogram of each channel."""

    def change(self, images: Tensor, amounts: Tensor) -> Tensor:
        values = images.flatten(2).long()
        counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
        counts.scatter_add_(2, values, torch.ones_like(values))
        highest = values.amax(2, keepdim=True)
        step = (values.shape[2] - counts.gather(2, highest)) // 255
        below = counts.cumsum(2) - counts
        table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
        table = torch.where(step > 0, table, torch.arange(256, device=images.device))
        return table.gather(2, values).view(images.shape).float()


class Sharpness(FactorOperation, ToneOperation):
    """Scales the distance of the inner pixels from their 3x3 smoothing by a factor of 1 - limit .. 1 + limit."""

    def amounts(self, draws: Draws) -> Tensor:
        return 1.0 + draws.symmetric(self.limit)

    def change(self, images: Tensor, amounts: Tensor) -> Tensor:
        if min(images.shape[2:]) < 3:
            return images
        inner = images[:, :, 1:-1, 1:-1]
        rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
        box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        smooth = ((box + 4.0 * inner) / 13.0).round()
        out = images.clone()
        out[:, :, 1:-1, 1:-1] += (inner - smooth) * (amounts - 1.0)
        return out.clamp_(0, 255)


@dataclass
class _Noise(PixelStep):
    std: Tensor  # [n]
    draws: Draws
    rows: slice = field(default_factory=lambda: slice(None))  # of the shard, in the global batch

    phase = 1

    def shard(self, shard: slice) -> Self:
        return replace(self, std=self.std[shard], rows=shard)

    def masked(self, mask: Tensor) -> Self:
        return replace(self, std=self.std * mask)

    def apply(self, images: Tensor) -> Tensor:
        shape = (self.draws.total, *images.shape[1:])
        normal = normals(shape, self.draws.generator)[self.rows]
        return torch.addcmul(images, normal, self.std.view(-1, 1, 1, 1), out=normal).clamp_(0, 255)


class GaussianNoise(Operation):
    """Adds Gaussian noise; the standard deviation is per image, uniform in 0..`std` (of 255)."""

    in_grey_levels = True

    def __init__(self, *, std: NonNegative) -> None:
        self.std = std

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        return [_Noise(draws.strength() * self.std, draws)]


def normals(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns float32 of that shape from the standard normal distribution.

    On a CPU, 16 random bits look up four adjacent numbers in a table of 2^16 groups, which takes a fifth of the time of
    torch.randn. The distribution function of each number is accurate to 2^-17; the largest number is 4.3. Groups are
    independent. The numbers within a group are uncorrelated (to 2^-8), but three of them determine the fourth.
    """
    if generator.device.type != "cpu":
        return torch.randn(shape, generator=generator, device=generator.device)
    count = torch.Size(shape).numel()
    groups = -(-count // _GROUP)
    bits = torch.empty(-(-groups // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    rows = bits.view(torch.int16)[:groups].int().add_(2**15)
    return _normal_table().index_select(0, rows).view(torch.float32)[:count].view(shape)


_GROUP = 4


@functools.cache
def _normal_table() -> Tensor:
    """Returns [2^16] groups of four float32; each column has the same 2^16 quantiles in a different random order.

    A group is stored as one complex128: index_select copies single values 4x as fast as rows.
    """
    middle = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    quantiles = torch.special.ndtri(middle).float()
    rng = torch.Generator().manual_seed(0)
    columns = [quantiles[torch.randperm(2**16, generator=rng)] for _ in range(_GROUP)]
    return torch.stack(columns, 1).view(torch.complex128).view(-1)
