"""Maps from output pixels to input pixels, and their rendering: a pipeline's maps become one resampling.

Coordinates are pixels from the image's centre, x to the right and y down.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dlopt.augment.operation import Warp

Border = Literal["zero", "reflect"]
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
        entries: dict[str, Any] = {}
        for name in _ENTRIES:
            mine, its = getattr(self, name), getattr(identity, name)
            if isinstance(mine, Tensor) or mine != its:
                entries[name] = torch.where(mask, mine, its)
        return replace(self, **entries)

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
