"""Geometric operations: each is a map from output pixels to input pixels, and a pipeline's maps become one warp.

Coordinates are pixels from the image's centre, x to the right and y down; a map is a 3x3 matrix on (x, y, 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

from dlopt.augment.operation import Draws, Operation, Shape, Step, Warp
from dlopt.errors import UserError
from dlopt.ranges import Count, Natural, NonNegative, Positive, PositiveShare, Probability

Border = Literal["zero", "reflect"]
Factor = Annotated[float, Ge(1)]
Degrees = Annotated[float, Interval(ge=0, le=180)]


Entry = Tensor | float
"""An entry of the samples' matrices: float32 [n], or one number for all of them, of which 0 and 1 cost nothing."""


@dataclass
class Affine(Warp):
    """Output pixel (x, y) to the input pixel (xx x + xy y + dx, yx x + yy y + dy).

    The output has `size` (height, width). `exact` promises that every map sends pixels to pixels along the axes (flips,
    whole shifts). `shrink` is the largest factor by which the step may reduce an image: from 1.5 on, several input
    pixels are averaged per output.
    """

    size: tuple[int, int]
    xx: Entry = 1.0
    xy: Entry = 0.0
    dx: Entry = 0.0
    yx: Entry = 0.0
    yy: Entry = 1.0
    dy: Entry = 0.0
    exact: bool = False
    shrink: float = 1.0

    def only(self, mask: Tensor) -> Self:
        identity = Affine(self.size)
        drawn: dict[str, Any] = {name: each for name in _ENTRIES if isinstance(each := getattr(self, name), Tensor)}
        return replace(self, **{name: each.where(mask, getattr(identity, name)) for name, each in drawn.items()})

    def then(self, second: "Affine") -> "Affine":
        """This map of input pixels behind the second one's: what comes later in a pipeline maps its outputs first."""
        a, b = self, second
        return Affine(
            b.size,
            xx=_plus(_times(a.xx, b.xx), _times(a.xy, b.yx)),
            xy=_plus(_times(a.xx, b.xy), _times(a.xy, b.yy)),
            dx=_plus(_plus(_times(a.xx, b.dx), _times(a.xy, b.dy)), a.dx),
            yx=_plus(_times(a.yx, b.xx), _times(a.yy, b.yx)),
            yy=_plus(_times(a.yx, b.xy), _times(a.yy, b.yy)),
            dy=_plus(_plus(_times(a.yx, b.dx), _times(a.yy, b.dy)), a.dy),
            exact=a.exact and b.exact,
            shrink=a.shrink * b.shrink,
        )

    def matrix(self, samples: int, device: torch.device) -> Tensor:
        """float32 [samples, 2, 3]."""
        entries = [getattr(self, name) for name in _ENTRIES]
        columns = [
            each if isinstance(each, Tensor) else torch.full((samples,), each, device=device) for each in entries
        ]
        return torch.stack(columns, 1).view(-1, 2, 3)


_ENTRIES = ("xx", "xy", "dx", "yx", "yy", "dy")


def _times(a: Entry, b: Entry) -> Entry:
    for one, other in ((a, b), (b, a)):
        if not isinstance(one, Tensor) and one in (0.0, 1.0):
            return other if one == 1.0 else 0.0
    return a * b


def _plus(a: Entry, b: Entry) -> Entry:
    for one, other in ((a, b), (b, a)):
        if not isinstance(one, Tensor) and one == 0.0:
            return other
    return a + b


@dataclass
class Radial(Warp):
    """Radius r to r * (1 + strength * r^2), the half diagonal being 1; `strength` [n] is positive for a barrel."""

    strength: Tensor

    def only(self, mask: Tensor) -> Self:
        return replace(self, strength=self.strength * mask)


class HorizontalFlip(Operation):
    """Mirrors left and right with probability `p`."""

    def __init__(self, *, p: Probability) -> None:
        self.p = p

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [Affine(shape[1:], xx=1.0 - 2.0 * draws.chance(self.p), exact=True)]


class AlternatingFlip(Operation):
    """Mirrors each image in every other epoch: half of them in even epochs, the other half in odd ones.

    Two successive epochs thus show every image once in each orientation (Jordan 2024, "94% on CIFAR-10 in 3.29
    seconds on a single GPU", section 3.6): image i is mirrored in epoch e where hash(i) + e is even.
    """

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        if draws.indices is None or draws.epoch is None:
            raise ValueError("AlternatingFlip needs the samples' indices and the epoch")
        mirrored = (_hash(draws.indices) + draws.epoch) % 2 == 0
        return [Affine(shape[1:], xx=1.0 - 2.0 * mirrored, exact=True)]


def _hash(numbers: Tensor) -> Tensor:
    """Well mixed 32 bits of whole numbers (the finalizer of MurmurHash3)."""
    mask = 0xFFFFFFFF
    numbers = (numbers + 1) * 0x9E3779B1 & mask
    numbers = (numbers ^ numbers >> 16) * 0x85EBCA6B & mask
    numbers = (numbers ^ numbers >> 13) * 0xC2B2AE35 & mask
    return numbers ^ numbers >> 16


class PadCrop(Operation):
    """Pads by `padding` pixels on each side and cuts out a random window of the original size.

    What lies outside the image is the pipeline's `border`.
    """

    def __init__(self, *, padding: Natural) -> None:
        self.padding = padding

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        x, y = draws.symmetric_integers(self.padding), draws.symmetric_integers(self.padding)
        return [Affine(shape[1:], dx=x.float(), dy=y.float(), exact=True)]


class TranslateX(Operation):
    """Moves sideways by up to `limit` times the width."""

    def __init__(self, *, limit: NonNegative) -> None:
        self.limit = limit

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [Affine(shape[1:], dx=-draws.symmetric(self.limit * shape[2]))]


class TranslateY(Operation):
    """Moves up or down by up to `limit` times the height."""

    def __init__(self, *, limit: NonNegative) -> None:
        self.limit = limit

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [Affine(shape[1:], dy=-draws.symmetric(self.limit * shape[1]))]


class Scale(Operation):
    """Enlarges or reduces about the centre by up to `factor`; the factor's logarithm is uniform."""

    def __init__(self, *, factor: Factor) -> None:
        self.log = math.log(factor)

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        inverse = (-draws.symmetric(self.log)).exp()
        return [Affine(shape[1:], xx=inverse, yy=inverse)]


class Rotate(Operation):
    """Turns about the centre by up to `degrees` to either side."""

    def __init__(self, *, degrees: Degrees) -> None:
        self.radians = math.radians(degrees)

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        angle = draws.symmetric(self.radians)
        cosine, sine = angle.cos(), angle.sin()
        return [Affine(shape[1:], xx=cosine, xy=sine, yx=-sine, yy=cosine)]


class Stretch(Operation):
    """Widens by f and lowers by f, or the reverse, keeping the area: 1/factor <= f <= factor, its logarithm uniform."""

    def __init__(self, *, factor: Factor) -> None:
        self.log = math.log(factor)

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        log = draws.symmetric(self.log)
        return [Affine(shape[1:], xx=(-log).exp(), yy=log.exp())]


class ShearX(Operation):
    """Moves rows sideways by up to `limit` pixels per pixel of height; the row that stays is the middle or the top."""

    def __init__(self, *, limit: NonNegative, about: Literal["centre", "corner"]) -> None:
        self.limit = limit
        self.about = about

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        slope = draws.symmetric(self.limit)
        return [Affine(shape[1:], xy=slope, dx=slope * (shape[1] / 2) if self.about == "corner" else 0.0)]


class ShearY(Operation):
    """Moves columns up or down by up to `limit` pixels per pixel of width; the middle or the left column stays."""

    def __init__(self, *, limit: NonNegative, about: Literal["centre", "corner"]) -> None:
        self.limit = limit
        self.about = about

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        slope = draws.symmetric(self.limit)
        return [Affine(shape[1:], yx=slope, dy=slope * (shape[2] / 2) if self.about == "corner" else 0.0)]


class Lens(Operation):
    """Barrel (positive) and pincushion (negative) distortion.

    An output pixel at the radius r from the centre (half diagonal = 1) shows the input at r * (1 + k r^2), with k
    uniform in -limit..limit: the first term of Brown's model (Brown 1966, "Decentering distortion of lenses").
    """

    def __init__(self, *, limit: Annotated[float, Interval(ge=0, le=1)]) -> None:
        self.limit = limit

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        return [Radial(draws.symmetric(self.limit))]


class RandomScaleCrop(Operation):
    """Brings the short side to a random length from `short_side` and cuts out a random square of `size` pixels.

    The training augmentation of VGG and ResNet (Simonyan & Zisserman 2015; He et al. 2016).
    """

    def __init__(self, *, short_side: tuple[Count, Count], size: Count) -> None:
        if not size <= short_side[0] <= short_side[1]:
            raise UserError(
                f"short_side=[{short_side[0]},{short_side[1]}]: has to rise, and to begin at size={size} or above"
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
        scaled = (length * scale + 1e-3).floor()
        start = (draws.position() * (scaled - self.size + 1)).floor()
        return length / scaled, (start + self.size / 2 - scaled / 2) * (length / scaled)


class RandomResizedCrop(Operation):
    """Brings a random part of the image to `size` x `size` pixels (null: to the image's own size).

    The part has a share of the area in `scale` and a ratio of width to height in `ratio`, its logarithm uniform
    (Szegedy et al. 2015). As in torchvision the first of ten drawn parts that fits is taken, else the central one.
    """

    def __init__(
        self, *, size: Count | None, scale: tuple[PositiveShare, PositiveShare], ratio: tuple[Positive, Positive]
    ) -> None:
        for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
            if low > high:
                raise UserError(f"{name}=[{low:g},{high:g}]: has to rise")
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
        first = fits.int().argmax(1, keepdim=True)
        bounded = min(max(width / height, self.ratio[0]), self.ratio[1])
        any_fits = fits.any(1)
        w = torch.where(any_fits, w.gather(1, first)[:, 0], min(width, round(height * bounded)))
        h = torch.where(any_fits, h.gather(1, first)[:, 0], min(height, round(width / bounded)))
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


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for batches of small matrices [n, i, j] and [n, j, k], float32."""
    if a.device.type == "mps":  # has no float64
        return (a[..., None] * b[:, None]).sum(2)
    # float64 is what neither autocast nor TF32 touches: a shift by 100 pixels in bf16 would be off by half a pixel
    return (a.double() @ b.double()).float()


def warp(images: Tensor, steps: Sequence[Warp], border: Border) -> Tensor:
    """Images [b, C, H, W] through all the steps with one resampling (bilinear; what does not move stays exact).

    Returns float32; the images' dtype and values where all steps are exact.
    """
    chain: list[Affine | Radial] = []
    for step in steps:
        if isinstance(step, Affine) and chain and isinstance(chain[-1], Affine):
            chain[-1] = chain[-1].then(step)
        else:
            assert isinstance(step, Affine | Radial)
            chain.append(step)
    if len(chain) == 1 and isinstance(chain[0], Affine) and chain[0].exact:
        return _copy(images, chain[0], border)
    return _resample(images.float(), chain, border)


def _resample(images: Tensor, chain: Sequence[Affine | Radial], border: Border) -> Tensor:
    height, width = images.shape[2:]
    # grid_sample's mirrors stand on the outermost pixels' centres with align_corners, on their outer edges without
    reflect = border == "reflect"
    x_unit, y_unit = (2 / max(1, length - 1) if reflect else 2 / length for length in (width, height))
    units = Affine((height, width), xx=x_unit, yy=y_unit)
    chain = [units.then(chain[0]), *chain[1:]] if isinstance(chain[0], Affine) else [units, *chain]
    sizes: list[tuple[int, int]] = []
    shrink = 1.0
    for step in chain:
        sizes.append(step.size if isinstance(step, Affine) else sizes[-1])
        shrink *= step.shrink if isinstance(step, Affine) else 1.0
    finer = max(1, round(shrink))
    y, x = (
        (torch.arange(n * finer, device=images.device, dtype=torch.float32) - (n * finer - 1) / 2) / finer
        for n in sizes[-1]
    )
    grid: Tensor | None = None
    for step, (rows, columns) in zip(reversed(chain), reversed(sizes), strict=True):
        if isinstance(step, Affine):
            matrix = step.matrix(len(images), images.device)
            grid = _plane(matrix, x, y) if grid is None else _moved(matrix, grid)
        else:
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"))[None] if grid is None else grid
            unit = 4.0 / (rows**2 + columns**2)
            grid = grid * (1.0 + (unit * step.strength).view(-1, 1, 1, 1) * grid.square().sum(1, keepdim=True))
    assert grid is not None
    mode = "reflection" if reflect else "zeros"
    result = F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode=mode, align_corners=reflect)
    return F.avg_pool2d(result, finer) if finer > 1 else result


def _plane(matrix: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[b, 2, len(y), len(x)]: matrix [b, 2, 3] on all (x, y, 1)."""
    columns = matrix[:, :, :1] * x
    rows = torch.addcmul(matrix[:, :, 2:], matrix[:, :, 1:2], y)
    return rows[..., None] + columns[:, :, None]


def _moved(matrix: Tensor, points: Tensor) -> Tensor:
    """[b, 2, h, w]: matrix [b, 2, 3] on points [b, 2, h, w]."""
    columns = matrix[:, :, :, None, None].unbind(2)
    return columns[0] * points[:, :1] + columns[1] * points[:, 1:] + columns[2]


def _copy(images: Tensor, step: Affine, border: Border) -> Tensor:
    """Flips and whole shifts as one gather: no pixel value changes, any dtype."""
    count, channels, height, width = images.shape
    columns = _pixels(step.xx, step.dx, step.size[1], width, border, images.device)
    rows = _pixels(step.yy, step.dy, step.size[0], height, border, images.device)
    if border == "zero":  # a frame of one black pixel, to which all that lies outside is sent
        images = F.pad(images, (1, 1, 1, 1))
        width += 2
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]
    return images.flatten(2).gather(2, index.expand(count, channels, -1)).view(count, channels, *step.size)


def _pixels(sign: Entry, shift: Entry, size: int, source: int, border: Border, device: torch.device) -> Tensor:
    """[b or 1, size] source pixels of the output pixels along one axis."""
    sign, shift = (each[:, None] if isinstance(each, Tensor) else each for each in (sign, shift))
    centred = torch.arange(size, device=device)[None] - (size - 1) / 2
    pixels = (centred * sign + (shift + (source - 1) / 2)).long()
    if border == "zero":
        return pixels.add_(1).clamp_(0, source + 1)
    if source == 1:
        return torch.zeros_like(pixels)
    pixels = pixels.remainder_(2 * (source - 1))
    return torch.minimum(pixels, 2 * (source - 1) - pixels)
