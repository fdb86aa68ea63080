"""Random erasing: boxes filled with a colour or noise."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from dlopt.augment.colour import colour_statistics
from dlopt.augment.operation import (
    DrawnStep,
    Draws,
    FractionSpan,
    Operation,
    PixelStep,
    Shape,
    Span,
    first_fitting,
    image_shape,
)
from dlopt.basics.ranges import PositiveFraction, Probability
from dlopt.data.samples import Samples


@dataclass
class _Erase(PixelStep):
    mask: Tensor  # [n] bool
    fill: Tensor  # [n, C, H, W] or [n, C, 1, 1], 0..255

    phase = 2
    keeps_dtype = True

    def masked(self, mask: Tensor) -> Self:
        return replace(self, mask=self.mask & mask)

    @abstractmethod
    def sides(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns the rows [n, height] and columns [n, width] of the boxes."""

    def apply(self, images: Tensor) -> Tensor:
        rows, columns = self.sides(*images.shape[2:])
        box = rows[:, :, None] & columns[:, None, :] & self.mask[:, None, None]
        fill = self.fill if images.is_floating_point() else self.fill.round()
        return torch.where(box[:, None], fill.to(images.dtype), images)


@dataclass
class _EraseSquare(_Erase):
    x: Tensor  # [n] centre, as a fraction of the width
    y: Tensor  # [n] centre, as a fraction of the height
    size: float  # side, as a fraction of the short side

    def sides(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        side = round(self.size * min(height, width))
        return centred_interval(self.y, side, height), centred_interval(self.x, side, width)


@dataclass
class _EraseBox(_Erase):
    left: Tensor  # [n] whole pixels
    top: Tensor  # [n]
    width: Tensor  # [n]
    height: Tensor  # [n]

    def sides(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        return _interval(self.top, self.height, height), _interval(self.left, self.width, width)


def centred_interval(centre: Tensor, length: Tensor | int, pixels: int) -> Tensor:
    """Returns bool [n, pixels]: the `length` pixels around the one at `centre` [n], in 0..1."""
    return _interval((centre * pixels).floor() - length // 2, length, pixels)


def _interval(start: Tensor, length: Tensor | int, pixels: int) -> Tensor:
    """Returns bool [n, pixels]: pixels in [start, start + length)."""
    index = torch.arange(pixels, device=start.device)
    return (index >= start[:, None]) & (index < (start + length)[:, None])


class Erase(Operation):
    """Cutout: with probability `p` erases a square around a random pixel, clipped at the image's edges.

    `size` is its side as a fraction of the short side: 0.5 is 16 of 32 pixels, as DeVries & Taylor 2017 on CIFAR-10.
    `fill=mean` is the training set's mean colour (the paper's zero after standardization), `zero` is black.
    """

    def __init__(
        self, *, p: Probability, size: PositiveFraction, fill: Literal["zero", "mean"], train: Samples
    ) -> None:
        self.p = p
        self.size = size
        self.colour = _colour(fill, train)

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        self.colour = self.colour.to(draws.device)  # kept: a copy from the host in every step synchronizes
        mask, x, y = draws.chance(self.p), draws.position(), draws.position()
        return [_EraseSquare(mask, self.colour.expand(draws.total, -1, -1, -1), x, y, self.size)]


class RandomErase(Operation):
    """Random erasing (Zhong et al. 2020, algorithm 1): with probability `p` erases a box within the image.

    Its area, as a fraction of the image, is uniform in `area`, and its ratio of height to width uniform in `ratio`.
    Uses the first of ten random boxes that fits; if none fits, erases nothing. `fill`: the training set's mean colour,
    zero (black), or a random value for each pixel of each channel.
    """

    _TRIALS = 10

    def __init__(
        self,
        *,
        p: Probability,
        area: FractionSpan,
        ratio: Span,
        fill: Literal["zero", "mean", "random"],
        train: Samples,
    ) -> None:
        self.p = p
        self.area = area
        self.ratio = ratio
        self.colour = None if fill == "random" else _colour(fill, train)
        self.in_grey_levels = fill == "random"

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        channels, height, width = shape
        area = draws.uniform(*self.area, self._TRIALS) * (height * width)
        ratio = draws.uniform(*self.ratio, self._TRIALS)
        h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (h > 0) & (h < height) & (w > 0) & (w < width)
        h, w = first_fitting(fits, h, w)
        left = (draws.position() * (width - w + 1)).floor()
        top = (draws.position() * (height - h + 1)).floor()
        mask = draws.chance(self.p) & fits.any(1)
        if self.colour is None:
            noise_shape = (draws.total, channels, height, width)
            fill = torch.rand(noise_shape, generator=draws.generator, device=draws.device) * 255
        else:
            self.colour = self.colour.to(draws.device)
            fill = self.colour.expand(draws.total, -1, -1, -1)
        return [_EraseBox(mask, fill, left, top, w, h)]


def _colour(fill: Literal["zero", "mean"], train: Samples) -> Tensor:
    """Returns [1, C, 1, 1], 0..255."""
    channels = image_shape(train.shape)[0]
    colour = 255.0 * colour_statistics(train)[0].float() if fill == "mean" else torch.zeros(channels)
    return colour.view(1, channels, 1, 1)
