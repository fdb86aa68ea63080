"""Erased squares."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from dlopt.augment.colour import colour_statistics
from dlopt.augment.operation import Draws, Operation, PixelStep, Shape, Step, image_shape
from dlopt.data.samples import Samples
from dlopt.ranges import PositiveShare, Probability


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

    def __init__(self, *, p: Probability, size: PositiveShare, fill: Literal["zero", "mean"], train: Samples) -> None:
        self.p = p
        self.size = size
        self.colour = (
            255.0 * colour_statistics(train)[0].float() if fill == "mean" else torch.zeros(image_shape(train.shape)[0])
        )

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        self.colour = self.colour.to(draws.device)  # once: a copy from the host makes it wait
        return [_Erase(draws.chance(self.p), draws.position(), draws.position(), self.size, self.colour)]
