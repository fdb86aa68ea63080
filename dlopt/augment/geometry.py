"""Geometric operations: each is a map from output pixels to input pixels, and a pipeline's maps become one warp.

Coordinates are pixels from the image's centre, x to the right and y down; a map is a 3x3 matrix on (x, y, 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dlopt.augment.operation import Draws, Operation, Step
from dlopt.ranges import Natural, Probability

Border = Literal["zero", "reflect"]


@dataclass
class Affine(Step):
    """Output pixel to input pixel, `matrix` [n, 3, 3]; the output has `size` (height, width).

    `exact` promises that every map sends pixels to pixels along the axes (flips, whole shifts).
    """

    matrix: Tensor
    size: tuple[int, int]
    exact: bool = False

    def take(self, part: slice) -> "Affine":
        return replace(self, matrix=self.matrix[part])

    def only(self, mask: Tensor) -> "Affine":
        identity = torch.eye(3, device=self.matrix.device)
        return replace(self, matrix=torch.where(mask[:, None, None], self.matrix, identity))


def matrices(
    draws: Draws,
    *,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    y: Tensor | float = 0.0,
) -> Tensor:
    """[total, 3, 3] with rows (xx, xy, x), (yx, yy, y), (0, 0, 1)."""
    result = torch.zeros(draws.total, 9, device=draws.device)
    for place, value in enumerate((xx, xy, x, yx, yy, y, 1.0)):
        column = 8 if place == 6 else place
        if isinstance(value, Tensor) or value != 0.0:
            result[:, column] = value
    return result.view(-1, 3, 3)


class HorizontalFlip(Operation):
    """Mirrors left and right with probability `p`."""

    def __init__(self, *, p: Probability) -> None:
        self.p = p

    def plan(self, draws: Draws, size: tuple[int, int]) -> list[Step]:
        return [Affine(matrices(draws, xx=1.0 - 2.0 * draws.chance(self.p)), size, exact=True)]


class PadCrop(Operation):
    """Pads by `padding` pixels on each side and cuts out a random window of the original size.

    What lies outside the image is the pipeline's `border`.
    """

    def __init__(self, *, padding: Natural) -> None:
        self.padding = padding

    def plan(self, draws: Draws, size: tuple[int, int]) -> list[Step]:
        shift_x = draws.integers(-self.padding, self.padding)
        shift_y = draws.integers(-self.padding, self.padding)
        return [Affine(matrices(draws, x=shift_x, y=shift_y), size, exact=True)]


def compose(steps: Sequence[Affine]) -> Affine:
    """The map of several warps applied one after the other."""
    matrix = steps[0].matrix
    for step in steps[1:]:
        matrix = matrix @ step.matrix
    return Affine(matrix, steps[-1].size, all(step.exact for step in steps))


def shift_exactly(images: Tensor, warp: Affine, border: Border) -> Tensor:
    """Flips and whole shifts of images [b, C, H, W] as one gather: no pixel value changes, any dtype."""
    count, channels, height, width = images.shape
    columns = _pixels(warp.matrix[:, 0, 0], warp.matrix[:, 0, 2], warp.size[1], width, border)
    rows = _pixels(warp.matrix[:, 1, 1], warp.matrix[:, 1, 2], warp.size[0], height, border)
    if border == "zero":  # a frame of one black pixel, to which all that lies outside is sent
        images = F.pad(images, (1, 1, 1, 1))
        width += 2
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]
    return images.flatten(2).gather(2, index.expand(-1, channels, -1)).view(count, channels, *warp.size)


def _pixels(sign: Tensor, shift: Tensor, size: int, source: int, border: Border) -> Tensor:
    """[b, size] source pixels of the output pixels along one axis."""
    centred = torch.arange(size, device=sign.device) - (size - 1) / 2
    pixels = (sign[:, None] * centred + (shift[:, None] + (source - 1) / 2)).long()
    if border == "zero":
        return pixels.add_(1).clamp_(0, source + 1)
    if source == 1:
        return torch.zeros_like(pixels)
    pixels = pixels.remainder_(2 * (source - 1))
    return torch.minimum(pixels, 2 * (source - 1) - pixels)
