"""Maps from output to input pixels, and their rendering: all maps of a pipeline become one resampling.

Coordinates are in pixels from the image's centre, x to the right and y down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dlopt.augment.operation import Warp
from dlopt.data.images.resampling import Taps, filter_taps, resample

Border = Literal["zero", "reflect"]
Entry = Tensor | float
"""An entry of the samples' matrices: float32 [n], or one number for all. Numbers 0 and 1 cost no computation."""


@dataclass
class Affine(Warp):
    """Maps output pixel (x, y) to input pixel (xx x + xy y + dx, yx x + yy y + dy).

    The output has `size` (height, width). `exact` promises that all maps are flips and whole-pixel shifts. `inside`
    promises that they scale along the axes and do not leave the image. `shrink` is the largest factor by which the step
    may shrink an image.
    """

    size: tuple[int, int]
    xx: Entry = 1.0
    xy: Entry = 0.0
    dx: Entry = 0.0
    yx: Entry = 0.0
    yy: Entry = 1.0
    dy: Entry = 0.0
    exact: bool = False
    inside: bool = False
    shrink: float = 1.0

    def masked(self, mask: Tensor) -> Self:
        identity = Affine(self.size)
        entries: dict[str, Any] = {}
        for name in _ENTRIES:
            value, unchanged = getattr(self, name), getattr(identity, name)
            if isinstance(value, Tensor) or value != unchanged:
                entries[name] = torch.where(mask, value, unchanged)
        return replace(self, **entries)

    def compose(self, second: "Affine") -> "Affine":
        """Returns the transform that applies this one to an image, then `second`.

        Maps go from output to input, so a pixel passes through the map of `second` first.
        """
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
            inside=a.inside and b.inside,
            shrink=a.shrink * b.shrink,
        )

    def matrix(self, samples: int, device: torch.device) -> Tensor:
        """Returns the matrices, float32 [samples, 2, 3]."""
        entries = (getattr(self, name) for name in _ENTRIES)
        columns = [e if isinstance(e, Tensor) else torch.full((samples,), e, device=device) for e in entries]
        return torch.stack(columns, 1).view(-1, 2, 3)


_ENTRIES = ("xx", "xy", "dx", "yx", "yy", "dy")


def _times(a: Entry, b: Entry) -> Entry:
    for factor, other in ((a, b), (b, a)):
        if not isinstance(factor, Tensor) and factor in (0.0, 1.0):
            return other if factor == 1.0 else 0.0
    return a * b


def _plus(a: Entry, b: Entry) -> Entry:
    for summand, other in ((a, b), (b, a)):
        if not isinstance(summand, Tensor) and summand == 0.0:
            return other
    return a + b


@dataclass
class Radial(Warp):
    """Maps radius r to r * (1 + strength * r^2), with half diagonal 1; `strength` [n] is positive for barrel."""

    strength: Tensor

    def masked(self, mask: Tensor) -> Self:
        return replace(self, strength=self.strength * mask)


def warp(images: Tensor, steps: Sequence[Warp], border: Border) -> Tensor:
    """Warps images [b, C, H, W] by all steps with one bilinear resampling; pixels that do not move keep their values.

    Shrinking is anti-aliased: crops and flips as in Pillow and torchvision; with other maps, several samples are
    averaged per output pixel.

    Returns float32; if all steps are exact, the images' dtype and values.
    """
    chain: list[Affine | Radial] = []
    for step in steps:
        if isinstance(step, Affine) and chain and isinstance(chain[-1], Affine):
            chain[-1] = chain[-1].compose(step)
        else:
            assert isinstance(step, Affine | Radial)
            chain.append(step)
    if len(chain) == 1 and isinstance(chain[0], Affine):
        if chain[0].exact:
            return _copy(images, chain[0], border)
        if chain[0].inside:
            return _resize(images.float(), chain[0])
    return _resample(images.float(), chain, border)


def _resize(images: Tensor, step: Affine) -> Tensor:
    """Resizes a box of each image, and flips it; pixels outside the box, but within the image, count at its edge."""
    rows, columns = (
        _axis_taps(scale, shift, count, length, step.shrink, images.device)
        for scale, shift, count, length in (
            (step.yy, step.dy, step.size[0], images.shape[2]),
            (step.xx, step.dx, step.size[1], images.shape[3]),
        )
    )
    return resample(images, rows, columns)


def _axis_taps(scale: Entry, shift: Entry, count: int, length: int, shrink: float, device: torch.device) -> Taps:
    scale, shift = (entry[:, None] if isinstance(entry, Tensor) else entry for entry in (scale, shift))
    centred = torch.arange(count, device=device, dtype=torch.float32)[None] - (count - 1) / 2
    return filter_taps(centred * scale + (shift + length / 2), scale, length, shrink)


def _resample(images: Tensor, chain: Sequence[Affine | Radial], border: Border) -> Tensor:
    height, width = images.shape[2:]
    # With align_corners, grid_sample reflects at the centres of the outermost pixels; without, at their outer edges.
    # The units of its coordinates (-1 to 1) differ accordingly.
    reflect = border == "reflect"
    x_unit, y_unit = (2 / max(1, length - 1) if reflect else 2 / length for length in (width, height))
    units = Affine((height, width), xx=x_unit, yy=y_unit)
    chain = [units.compose(chain[0]), *chain[1:]] if isinstance(chain[0], Affine) else [units, *chain]
    sizes: list[tuple[int, int]] = []
    shrink = 1.0
    for step in chain:
        sizes.append(step.size if isinstance(step, Affine) else sizes[-1])
        shrink *= step.shrink if isinstance(step, Affine) else 1.0
    oversampling = math.ceil(max(1.0, shrink) - 1e-6)
    y, x = (
        (torch.arange(n * oversampling, device=images.device, dtype=torch.float32) - (n * oversampling - 1) / 2)
        / oversampling
        for n in sizes[-1]
    )
    # From the output pixels back through the chain. The first affine map needs no grid: it is separable.
    grid: Tensor | None = None
    for step, (rows, columns) in zip(reversed(chain), reversed(sizes), strict=True):
        if isinstance(step, Affine):
            matrix = step.matrix(len(images), images.device)
            grid = _map_plane(matrix, x, y) if grid is None else _map_points(matrix, grid)
        else:
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"))[None] if grid is None else grid
            unit = 4.0 / (rows**2 + columns**2)
            grid = grid * (1.0 + (unit * step.strength).view(-1, 1, 1, 1) * grid.square().sum(1, keepdim=True))
    assert grid is not None
    mode = "reflection" if reflect else "zeros"
    result = F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode=mode, align_corners=reflect)
    return F.avg_pool2d(result, oversampling) if oversampling > 1 else result


def _map_plane(matrix: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Returns [b, 2, len(y), len(x)]: matrix [b, 2, 3] applied to all (x, y, 1)."""
    columns = matrix[:, :, :1] * x
    rows = torch.addcmul(matrix[:, :, 2:], matrix[:, :, 1:2], y)
    return rows[..., None] + columns[:, :, None]


def _map_points(matrix: Tensor, points: Tensor) -> Tensor:
    """Returns [b, 2, h, w]: matrix [b, 2, 3] applied to points [b, 2, h, w]."""
    columns = matrix[:, :, :, None, None].unbind(2)
    return columns[0] * points[:, :1] + columns[1] * points[:, 1:] + columns[2]


def _copy(images: Tensor, step: Affine, border: Border) -> Tensor:
    """Applies flips and whole-pixel shifts as one gather: exact, for any dtype."""
    count, channels, height, width = images.shape
    columns = _pixels(step.xx, step.dx, step.size[1], width, border, images.device)
    rows = _pixels(step.yy, step.dy, step.size[0], height, border, images.device)
    if border == "zero":  # adds a black frame of one pixel, to which all outside pixels are mapped
        images = F.pad(images, (1, 1, 1, 1))
        width += 2
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]
    return images.flatten(2).gather(2, index.expand(count, channels, -1)).view(count, channels, *step.size)


def _pixels(sign: Entry, shift: Entry, size: int, source: int, border: Border, device: torch.device) -> Tensor:
    """Returns the source pixels [b or 1, size] of the output pixels along one axis."""
    sign, shift = (entry[:, None] if isinstance(entry, Tensor) else entry for entry in (sign, shift))
    centred = torch.arange(size, device=device)[None] - (size - 1) / 2
    pixels = (centred * sign + (shift + (source - 1) / 2)).long()
    if border == "zero":
        return pixels.add_(1).clamp_(0, source + 1)
    if source == 1:
        return torch.zeros_like(pixels)
    pixels = pixels.remainder_(2 * (source - 1))
    return torch.minimum(pixels, 2 * (source - 1) - pixels)
