"""Erased boxes."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from dlopt.augment.colour import colour_statistics
from dlopt.augment.operation import Draws, Operation, PixelStep, Shape, Step, image_shape
from dlopt.data.samples import Samples
from dlopt.errors import UserError
from dlopt.ranges import Positive, PositiveFraction, Probability


@dataclass
class _Erase(PixelStep):
    mask: Tensor  # [n] bool
    x: Tensor  # [n] centre, a share of the width
    y: Tensor  # [n]
    size: float  # side, a share of the short side
    colour: Tensor  # [C], 0..255

    phase = 2
    keeps_dtype = True

    def take(self, part: slice) -> Self:
        return replace(self, mask=self.mask[part], x=self.x[part], y=self.y[part])

    def only(self, mask: Tensor) -> Self:
        return replace(self, mask=self.mask & mask)

    def apply(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        side = round(self.size * min(height, width))
        box = inside(self.x, side, width)[:, None, :] & inside(self.y, side, height)[:, :, None]
        colour = (self.colour if images.is_floating_point() else self.colour.round()).to(images.dtype)
        return torch.where((box & self.mask[:, None, None])[:, None], colour[:, None, None], images)


def inside(centre: Tensor, side: Tensor | int, length: int) -> Tensor:
    """[n, length]: the pixels within a box of `side` (whole) pixels about that in which `centre` [n], 0..1, falls."""
    start = (centre * length).floor() - side // 2
    pixels = torch.arange(length, device=centre.device)
    return (pixels >= start[:, None]) & (pixels < (start + side)[:, None])


class Erase(Operation):
    """Cutout: with probability `p` erases a square about a random pixel, cut off at the image's edges.

    `size` is its side in shares of the short side: 0.5 is the 16 of 32 pixels of DeVries & Taylor 2017 on CIFAR-10.
    `fill=mean` is the training set's mean colour (the paper's zero after standardization), `zero` is black.
    """

    def __init__(
        self, *, p: Probability, size: PositiveFraction, fill: Literal["zero", "mean"], train: Samples
    ) -> None:
        self.p = p
        self.size = size
        self.colour = _colour(fill, train)

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        self.colour = self.colour.to(draws.device)  # once: a copy from the host makes it wait
        return [_Erase(draws.chance(self.p), draws.position(), draws.position(), self.size, self.colour)]


@dataclass
class _EraseBox(PixelStep):
    mask: Tensor  # [n] bool
    left: Tensor  # [n] pixels, whole
    top: Tensor  # [n]
    width: Tensor  # [n]
    height: Tensor  # [n]
    fill: Tensor  # [n, C, H, W] or [n, C, 1, 1], 0..255

    phase = 2
    keeps_dtype = True

    def only(self, mask: Tensor) -> Self:
        return replace(self, mask=self.mask & mask)

    def apply(self, images: Tensor) -> Tensor:
        rows = _between(self.top, self.height, images.shape[2])
        columns = _between(self.left, self.width, images.shape[3])
        box = rows[:, :, None] & columns[:, None, :] & self.mask[:, None, None]
        fill = self.fill if images.is_floating_point() else self.fill.round()
        return torch.where(box[:, None], fill.to(images.dtype), images)


def _between(start: Tensor, length: Tensor, pixels: int) -> Tensor:
    """[n, pixels]"""
    each = torch.arange(pixels, device=start.device)
    return (each >= start[:, None]) & (each < (start + length)[:, None])


class RandomErase(Operation):
    """Random erasing (Zhong et al. 2020, algorithm 1): with probability `p` erases a box within the image.

    Its area is uniform in `area`, a share of the image's, and its ratio of height to width uniform in `ratio`. The
    first of ten drawn boxes that fits is taken; where none does the image stays whole. `fill`: the training set's mean
    colour, zero (black), or a random value for each pixel of each channel.
    """

    _TRIALS = 10

    def __init__(
        self,
        *,
        p: Probability,
        area: tuple[PositiveFraction, PositiveFraction],
        ratio: tuple[Positive, Positive],
        fill: Literal["zero", "mean", "random"],
        train: Samples,
    ) -> None:
        for name, (low, high) in {"area": area, "ratio": ratio}.items():
            if low > high:
                raise UserError(f"{name}=[{low:g},{high:g}]: has to rise")
        self.p = p
        self.area = area
        self.ratio = ratio
        self.colour = None if fill == "random" else _colour(fill, train)

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        channels, height, width = shape
        area = draws.uniform(*self.area, self._TRIALS) * (height * width)
        ratio = draws.uniform(*self.ratio, self._TRIALS)
        h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (h > 0) & (h < height) & (w > 0) & (w < width)
        first = fits.int().argmax(1, keepdim=True)
        h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
        left = (draws.position() * (width - w + 1)).floor()
        top = (draws.position() * (height - h + 1)).floor()
        mask = draws.chance(self.p) & fits.any(1)
        if self.colour is None:
            fill = (
                torch.rand(draws.total, channels, height, width, generator=draws.generator, device=draws.device) * 255
            )
        else:
            self.colour = self.colour.to(draws.device)
            fill = self.colour[None, :, None, None].expand(draws.total, -1, -1, -1)
        return [_EraseBox(mask, left, top, w, h, fill)]


def _colour(fill: Literal["zero", "mean"], train: Samples) -> Tensor:
    """[C], 0..255."""
    if fill == "mean":
        return 255.0 * colour_statistics(train)[0].float()
    return torch.zeros(image_shape(train.shape)[0])
