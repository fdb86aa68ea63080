"""Geometric operations: each draws maps from output to input pixels. Coordinates as in `dlopt.augment.warp`."""

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from dlopt.augment.operation import Draws, Operation, Shape, Step, check_intervals, first_fitting
from dlopt.augment.warp import Affine, Radial
from dlopt.errors import UserError
from dlopt.ranges import Count, Natural, NonNegative, Positive, PositiveFraction, Probability

Factor = Annotated[float, Ge(1)]
Degrees = Annotated[float, Interval(ge=0, le=180)]


class HorizontalFlip(Operation):
    """Flips left and right with probability `p`."""

    def __init__(self, *, p: Probability) -> None:
        self.p = p

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [Affine(shape[1:], xx=1.0 - 2.0 * draws.chance(self.p), exact=True)]


class AlternatingFlip(Operation):
    """Flips each image in every other epoch: half of the images in even epochs, the other half in odd ones.

    Two successive epochs therefore show every image in both orientations (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds
    on a single GPU", section 3.6). Image i is flipped in epoch e if hash(i) + e is even.
    """

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        if draws.indices is None or draws.epoch is None:
            raise ValueError("AlternatingFlip needs the samples' indices and the epoch")
        flipped = (_hash(draws.indices) + draws.epoch) % 2 == 0
        return [Affine(shape[1:], xx=1.0 - 2.0 * flipped, exact=True)]


def _hash(numbers: Tensor) -> Tensor:
    """Hashes integers to 32 bits (the finalizer of MurmurHash3)."""
    mask = 0xFFFFFFFF
    numbers = (numbers + 1) * 0x9E3779B1 & mask
    numbers = (numbers ^ numbers >> 16) * 0x85EBCA6B & mask
    numbers = (numbers ^ numbers >> 13) * 0xC2B2AE35 & mask
    return numbers ^ numbers >> 16


class PadCrop(Operation):
    """Pads by `padding` pixels on each side (pipeline key `border`) and crops a random window of the input size."""

    def __init__(self, *, padding: Natural) -> None:
        self.padding = padding

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        x, y = draws.symmetric_integers(self.padding), draws.symmetric_integers(self.padding)
        return [Affine(shape[1:], dx=x.float(), dy=y.float(), exact=True)]


class _Translate(Operation):
    def __init__(self, *, limit: NonNegative) -> None:
        self.limit = limit


class TranslateX(_Translate):
    """Translates horizontally by up to `limit` times the width."""

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [Affine(shape[1:], dx=-draws.symmetric(self.limit * shape[2]))]


class TranslateY(_Translate):
    """Translates vertically by up to `limit` times the height."""

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [Affine(shape[1:], dy=-draws.symmetric(self.limit * shape[1]))]


class _Stretch(Operation):
    def __init__(self, *, factor: Factor) -> None:
        self.log = math.log(factor)


class Scale(_Stretch):
    """Scales about the centre by 1/factor to factor, log-uniform."""

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        inverse = (-draws.symmetric(self.log)).exp()
        return [Affine(shape[1:], xx=inverse, yy=inverse)]


class Rotate(Operation):
    """Rotates about the centre by -degrees to degrees."""

    def __init__(self, *, degrees: Degrees) -> None:
        self.radians = math.radians(degrees)

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        angle = draws.symmetric(self.radians)
        cosine, sine = angle.cos(), angle.sin()
        return [Affine(shape[1:], xx=cosine, xy=sine, yx=-sine, yy=cosine)]


class Stretch(_Stretch):
    """Scales the width by f and the height by 1/f, keeping the area; f is log-uniform from 1/factor to factor."""

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        log = draws.symmetric(self.log)
        return [Affine(shape[1:], xx=(-log).exp(), yy=log.exp())]


class _Shear(Operation):
    def __init__(self, *, limit: NonNegative, about: Literal["centre", "corner"]) -> None:
        self.limit = limit
        self.about = about


class ShearX(_Shear):
    """Shifts rows horizontally by up to `limit` pixels per pixel of height; the middle or top row stays fixed."""

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        slope = draws.symmetric(self.limit)
        return [Affine(shape[1:], xy=slope, dx=slope * (shape[1] / 2) if self.about == "corner" else 0.0)]


class ShearY(_Shear):
    """Shifts columns vertically by up to `limit` pixels per pixel of width; the middle or left column stays fixed."""

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        slope = draws.symmetric(self.limit)
        return [Affine(shape[1:], yx=slope, dy=slope * (shape[2] / 2) if self.about == "corner" else 0.0)]


class Lens(Operation):
    """Barrel (positive) and pincushion (negative) distortion.

    An output pixel at radius r from the centre (half diagonal = 1) shows the input pixel at r * (1 + k r^2), with k
    uniform in -limit..limit: the first term of Brown's model (Brown 1966, "Decentering distortion of lenses").
    """

    def __init__(self, *, limit: Annotated[float, Interval(ge=0, le=1)]) -> None:
        self.limit = limit

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [Radial(draws.symmetric(self.limit))]


class RandomScaleCrop(Operation):
    """Resizes the short side to a random length in `short_side` and crops a random square of `size` pixels.

    The training augmentation of VGG and ResNet (Simonyan & Zisserman 2015; He et al. 2016).
    """

    def __init__(self, *, short_side: tuple[Count, Count], size: Count) -> None:
        if not size <= short_side[0] <= short_side[1]:
            raise UserError(
                f"short_side=[{short_side[0]},{short_side[1]}]: must be increasing and not below size={size}"
            )
        self.short_side = short_side
        self.size = size

    def output_shape(self, shape: Shape) -> Shape:
        return shape[0], self.size, self.size

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        scale = draws.integers(*self.short_side) / min(shape[1:])
        (xx, x), (yy, y) = self._axis(draws, scale, shape[2]), self._axis(draws, scale, shape[1])
        shrink = min(shape[1:]) / self.short_side[0]
        return [Affine(self.output_shape(shape)[1:], xx=xx, dx=x, yy=yy, dy=y, shrink=shrink)]

    def _axis(self, draws: Draws, scale: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Returns (scale, shift) of the map along one axis."""
        scaled = (length * scale + 1e-3).floor()  # pixels; without the 1e-3, rounding could lose one
        start = (draws.position() * (scaled - self.size + 1)).floor()
        return length / scaled, (start + self.size / 2 - scaled / 2) * (length / scaled)


class RandomResizedCrop(Operation):
    """Resizes a random crop of the image to `size` x `size` pixels (null: to the image's size).

    The crop has a fraction of the area uniform in `scale`, and a ratio of width to height log-uniform in `ratio`
    (Szegedy et al. 2015). As torchvision, uses the first of ten random crops that fits, else a central crop.
    """

    def __init__(
        self, *, size: Count | None, scale: tuple[PositiveFraction, PositiveFraction], ratio: tuple[Positive, Positive]
    ) -> None:
        check_intervals(scale=scale, ratio=ratio)
        self.size = size
        self.scale = scale
        self.ratio = ratio

    def output_shape(self, shape: Shape) -> Shape:
        return shape if self.size is None else (shape[0], self.size, self.size)

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        height, width = shape[1:]
        area = draws.uniform(*self.scale, 10) * (height * width)
        ratio = draws.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), 10).exp()
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        w, h = first_fitting(fits, w, h)
        bounded = min(max(width / height, self.ratio[0]), self.ratio[1])
        any_fits = fits.any(1)
        w = torch.where(any_fits, w, min(width, round(height * bounded)))
        h = torch.where(any_fits, h, min(height, round(width / bounded)))
        left = torch.where(any_fits, draws.position() * (width - w + 1), (width - w) / 2).floor()
        top = torch.where(any_fits, draws.position() * (height - h + 1), (height - h) / 2).floor()
        out = self.output_shape(shape)
        return [
            Affine(
                out[1:],
                xx=w / out[2],
                dx=left + w / 2 - width / 2,
                yy=h / out[1],
                dy=top + h / 2 - height / 2,
                shrink=math.sqrt(self.scale[1]) * max(height / out[1], width / out[2]),
            )
        ]
