"""Geometric operations: each draws maps from output to input pixels. Coordinates as in `dlopt.augment.warp`."""

import math
from typing import Annotated, Literal

from annotated_types import Ge, Interval
from torch import Tensor

from dlopt.augment.operation import DrawnStep, Draws, Operation, Shape
from dlopt.augment.warp import Affine, Radial
from dlopt.basics.ranges import Natural, NonNegative, Probability

Factor = Annotated[float, Ge(1)]
Degrees = Annotated[float, Interval(ge=0, le=180)]


class HorizontalFlip(Operation):
    """Flips left and right with probability `p`."""

    def __init__(self, *, p: Probability) -> None:
        self.p = p

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        return [Affine(shape[1:], xx=1.0 - 2.0 * draws.chance(self.p), exact=True, inside=True)]


class AlternatingFlip(Operation):
    """Flips each image in every other epoch: half of the images in even epochs, the other half in odd ones.

    Two successive epochs therefore show every image in both orientations (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds
    on a single GPU", section 3.6). Image i is flipped in epoch e if hash(i) + e is even.
    """

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        if draws.indices is None or draws.epoch is None:
            raise ValueError("AlternatingFlip needs the samples' indices and the epoch")
        flipped = (_hash(draws.indices) + draws.epoch) % 2 == 0
        return [Affine(shape[1:], xx=1.0 - 2.0 * flipped, exact=True, inside=True)]


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

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        x, y = draws.symmetric_integers(self.padding), draws.symmetric_integers(self.padding)
        return [Affine(shape[1:], dx=x.float(), dy=y.float(), exact=True)]


class _Translate(Operation):
    def __init__(self, *, limit: NonNegative) -> None:
        self.limit = limit


class TranslateX(_Translate):
    """Translates horizontally by up to `limit` times the width."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        return [Affine(shape[1:], dx=-draws.symmetric(self.limit * shape[2]))]


class TranslateY(_Translate):
    """Translates vertically by up to `limit` times the height."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        return [Affine(shape[1:], dy=-draws.symmetric(self.limit * shape[1]))]


class _Stretch(Operation):
    def __init__(self, *, factor: Factor) -> None:
        self.log = math.log(factor)


class Scale(_Stretch):
    """Scales about the centre by 1/factor to factor, log-uniform."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        inverse = (-draws.symmetric(self.log)).exp()
        return [Affine(shape[1:], xx=inverse, yy=inverse)]


class Rotate(Operation):
    """Rotates about the centre by -degrees to degrees."""

    def __init__(self, *, degrees: Degrees) -> None:
        self.radians = math.radians(degrees)

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        angle = draws.symmetric(self.radians)
        cosine, sine = angle.cos(), angle.sin()
        return [Affine(shape[1:], xx=cosine, xy=sine, yx=-sine, yy=cosine)]


class Stretch(_Stretch):
    """Scales the width by f and the height by 1/f, keeping the area; f is log-uniform from 1/factor to factor."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        log = draws.symmetric(self.log)
        return [Affine(shape[1:], xx=(-log).exp(), yy=log.exp())]


class _Shear(Operation):
    def __init__(self, *, limit: NonNegative, about: Literal["centre", "corner"]) -> None:
        self.limit = limit
        self.about = about


class ShearX(_Shear):
    """Shifts rows horizontally by up to `limit` pixels per pixel of height; the middle or top row stays fixed."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        slope = draws.symmetric(self.limit)
        return [Affine(shape[1:], xy=slope, dx=slope * (shape[1] / 2) if self.about == "corner" else 0.0)]


class ShearY(_Shear):
    """Shifts columns vertically by up to `limit` pixels per pixel of width; the middle or left column stays fixed."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        slope = draws.symmetric(self.limit)
        return [Affine(shape[1:], yx=slope, dy=slope * (shape[2] / 2) if self.about == "corner" else 0.0)]


class Lens(Operation):
    """Barrel (positive) and pincushion (negative) distortion.

    An output pixel at radius r from the centre (half diagonal = 1) shows the input pixel at r * (1 + k r^2), with k
    uniform in -limit..limit: the first term of Brown's model (Brown 1966, "Decentering distortion of lenses").
    """

    def __init__(self, *, limit: Annotated[float, Interval(ge=0, le=1)]) -> None:
        self.limit = limit

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        return [Radial(draws.symmetric(self.limit))]
