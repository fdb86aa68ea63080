"""Random crops. Crops that are resized to one size are taken from the full-size image while its file is read."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from dlopt.augment.operation import DrawnStep, Draws, FractionSpan, Operation, Shape, Span, first_fitting
from dlopt.augment.warp import Affine
from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.basics.ranges import Count
from dlopt.data.samples import Samples


class RandomCrop(Operation):
    """Crops a random square of `size` pixels; of image files, from the centre that `data.image_size` keeps."""

    def __init__(self, *, size: Count) -> None:
        self.size = size

    def output_shape(self, shape: Shape) -> Shape:
        if min(shape[1:]) < self.size:
            raise UserError(
                f"augmentation: crops of size={self.size} do not fit in images of {shape[1]}x{shape[2]} pixels"
            )
        return shape[0], self.size, self.size

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        dx, dy = (
            (draws.position() * (length - self.size + 1)).floor() + (self.size - length) / 2
            for length in (shape[2], shape[1])
        )
        return [Affine((self.size, self.size), dx=dx, dy=dy, exact=True, inside=True)]


class ResizingCrop(Operation):
    """Resizes a random box of the image, with anti-aliasing. The draws do not depend on the size of the image."""

    @abstractmethod
    def draw(self, draws: Draws) -> Tensor:
        """Returns random numbers [total, k]."""

    @abstractmethod
    def boxes(self, numbers: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Returns (left, top, width, height) [n, 4] of the boxes, within the images.

        Args:
            numbers: [n, k], from `draw`.
            height, width: of the images: scalars, or [n].
        """

    @abstractmethod
    def max_shrink(self, shape: Shape) -> float:
        """Returns the largest factor by which an image of that shape may shrink."""

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        numbers = self.draw(draws)
        # Filled on the device: a copy from the host in every step synchronizes.
        height, width = (numbers.new_full((), length) for length in shape[1:])
        left, top, w, h = self.boxes(numbers, height, width).unbind(1)
        _, rows, columns = self.output_shape(shape)
        return [
            Affine(
                (rows, columns),
                xx=w / columns,
                dx=left + w / 2 - shape[2] / 2,
                yy=h / rows,
                dy=top + h / 2 - shape[1] / 2,
                shrink=self.max_shrink(shape),
                inside=True,
            )
        ]


class RandomScaleCrop(ResizingCrop):
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

    def max_shrink(self, shape: Shape) -> float:
        scale = self.short_side[0] / min(shape[1:])
        # The long side shrinks more if its length is rounded down, see `_axis`.
        return max(length / math.floor(length * scale + 1e-3) for length in shape[1:])

    def draw(self, draws: Draws) -> Tensor:
        return torch.stack([draws.integers(*self.short_side).float(), draws.position(), draws.position()], 1)

    def boxes(self, numbers: Tensor, height: Tensor, width: Tensor) -> Tensor:
        short_side, x, y = numbers.unbind(1)
        scale = short_side / torch.minimum(height, width)
        (left, w), (top, h) = self._axis(x, scale, width), self._axis(y, scale, height)
        return torch.stack([left, top, w, h], 1)

    def _axis(self, position: Tensor, scale: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (start, length) of the boxes along one axis."""
        scaled = (length * scale + 1e-3).floor()  # pixels; without the 1e-3, rounding could lose one
        start = (position * (scaled - self.size + 1)).floor()
        return start * (length / scaled), self.size * (length / scaled)


class RandomResizedCrop(ResizingCrop):
    """Resizes a random crop of the image to `size` x `size` pixels (null: to the image's size).

    The crop has a fraction of the area uniform in `scale`, and a ratio of width to height log-uniform in `ratio`
    (Szegedy et al. 2015). As torchvision, uses the first of ten random crops that fits, else a central crop.
    """

    def __init__(self, *, size: Count | None, scale: FractionSpan, ratio: Span) -> None:
        self.size = size
        self.scale = scale
        self.ratio = ratio

    def output_shape(self, shape: Shape) -> Shape:
        return shape if self.size is None else (shape[0], self.size, self.size)

    def max_shrink(self, shape: Shape) -> float:
        # A crop of a fraction of the area may still have the full height or width.
        _, rows, columns = self.output_shape(shape)
        return max(shape[1] / rows, shape[2] / columns)

    def draw(self, draws: Draws) -> Tensor:
        areas = draws.uniform(*self.scale, 10)
        ratios = draws.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), 10)
        return torch.cat([areas, ratios, draws.position()[:, None], draws.position()[:, None]], 1)

    def boxes(self, numbers: Tensor, height: Tensor, width: Tensor) -> Tensor:
        height, width = (length.expand(len(numbers))[:, None] for length in (height, width))
        area, ratio = numbers[:, :10] * (height * width), numbers[:, 10:20].exp()
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        w, h = first_fitting(fits, w, h)
        height, width = height[:, 0], width[:, 0]
        bounded = (width / height).clamp(*self.ratio)
        any_fits = fits.any(1)
        w = torch.where(any_fits, w, torch.minimum(width, (height * bounded).round()))
        h = torch.where(any_fits, h, torch.minimum(height, (width / bounded).round()))
        left = torch.where(any_fits, numbers[:, 20] * (width - w + 1), (width - w) / 2).floor()
        top = torch.where(any_fits, numbers[:, 21] * (height - h + 1), (height - h) / 2).floor()
        return torch.stack([left, top, w, h], 1)


class CropReader:
    """Reads random crops of image files, at their full resolution and from the whole image.

    Each sample has its own stream of random numbers (seed, update, position in the global batch). The crops therefore
    do not depend on the number of processes that read them.

    Args:
        shape: of the samples without the crop, [C, H, W].
    """

    def __init__(self, samples: Samples, crop: ResizingCrop, shape: Shape, seed: int) -> None:
        self._samples = samples
        self._crop = crop
        self._size = crop.output_shape(shape)[1:]
        self._seed = seed

    def fetch(self, requests: Tensor) -> Tensor:
        """Returns the crops [B, C, *size] of `requests` [B, 3]: index of the sample, update, position in the batch."""
        numbers = [
            self._crop.draw(Draws(generator("cpu", self._seed, update, position), 1))
            for _, update, position in requests.tolist()
        ]

        def boxes(heights: Tensor, widths: Tensor) -> Tensor:
            if not numbers:
                return torch.empty(0, 4)
            left, top, w, h = self._crop.boxes(torch.cat(numbers), heights.float(), widths.float()).unbind(1)
            return torch.stack([left, top, left + w, top + h], 1)

        return self._samples.fetch_boxes(requests[:, 0], boxes, self._size)
