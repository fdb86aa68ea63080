"""Test-time augmentation: several views of each image, whose outputs are averaged."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dlopt.augment.pipeline import CentreCrop
from dlopt.data.images import resize
from dlopt.errors import UserError
from dlopt.ranges import Count

Size = tuple[int, int]  # height, width
Crops = Callable[[Tensor], Iterator[tuple[float, Tensor]]]
"""Images [B, C, H, W] in 0..255 -> (weight, images of the model's size) of each view; the weights add up to 1."""

# The scales of He et al. 2015 for crops of 224: 224, 256, 384, 480, 640.
_RATIOS = (1.0, 256 / 224, 384 / 224, 480 / 224, 640 / 224)


@dataclass(frozen=True, kw_only=True)
class Flip:
    """The image and its mirror image."""

    def views(self, window: Size, image: Size) -> "Plan":
        return Plan(window, image, _flipped(_centre(window)))


@dataclass(frozen=True, kw_only=True)
class ShiftFlip:
    """The image (weight 1/2) and its shifts by `shift` pixels to the upper left and the lower right (1/4 each), all
    with their mirror images; what is shifted in is a reflection (Jordan's airbench94, 2024).
    """

    shift: Count = 1  # pixels

    def views(self, window: Size, image: Size) -> "Plan":
        if self.shift >= min(window):
            raise UserError(f"tta.shift={self.shift}: the images have only {window[0]}x{window[1]} pixels")

        def shifted(images: Tensor) -> Iterator[tuple[float, Tensor]]:
            (height, width), s = window, self.shift
            for _, centre in _centre(window)(images):
                padded = pad(centre, (s, s, s, s), mode="reflect")
                yield 0.5, centre
                yield 0.25, padded[:, :, :height, :width]
                yield 0.25, padded[:, :, 2 * s :, 2 * s :]

        return Plan(window, image, _flipped(shifted))


@dataclass(frozen=True, kw_only=True)
class TenCrop:
    """Corners and centre of the image, and their mirror images (Krizhevsky et al. 2012).

    scale: of the image's shorter side before the crops are cut; null: the image as it is where it is larger than the
    crop, otherwise 8/7 of the crop (256 for 224).
    crop: its height and width; null: the size that the model was trained on.
    """

    scale: Count | None = None
    crop: Count | None = None

    def views(self, window: Size, image: Size) -> "Plan":
        crop = window if self.crop is None else (self.crop, self.crop)
        if self.scale is not None:
            scales: Sequence[int] = [self.scale]
        else:
            larger = image[0] > crop[0] and image[1] > crop[1]
            scales = [min(image) if larger else round(max(crop) * _RATIOS[1])]
        return _multi_scale(crop, image, scales, "tta.scale")


@dataclass(frozen=True, kw_only=True)
class MultiScaleTenCrop:
    """Ten crops at each of several scales of the image's shorter side.

    scales: null: 224, 256, 384, 480 and 640 for crops of 224 (He et al. 2015), and in this proportion for others.
    crop: as for ten_crop.
    """

    scales: tuple[Count, ...] | None = None
    crop: Count | None = None

    def views(self, window: Size, image: Size) -> "Plan":
        crop = window if self.crop is None else (self.crop, self.crop)
        scales = [round(max(crop) * ratio) for ratio in _RATIOS] if self.scales is None else self.scales
        return _multi_scale(crop, image, scales, "tta.scales")


@dataclass(frozen=True)
class Plan:
    """The views of one choice: the size of each, the size in which they want the images, and the views themselves."""

    size: Size
    image: Size
    views: Crops


CHOICES = {"flip": Flip, "shift_flip": ShiftFlip, "ten_crop": TenCrop, "multi_scale_ten_crop": MultiScaleTenCrop}


def crop_positions(image: Size, crop: Size) -> list[tuple[int, int]]:
    """(top, left) of the four corners and the centre, as torchvision's `five_crop` has them."""
    bottom, right = image[0] - crop[0], image[1] - crop[1]
    return [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]


def ten_crop(images: Tensor, crop: Size) -> Iterator[tuple[float, Tensor]]:
    """The crops of `images` [B, C, H, W], then those of their mirror images, a tenth each; equal ones come once."""
    positions = Counter(crop_positions((images.shape[2], images.shape[3]), crop))
    for source in (images, images.flip(3)):
        for (top, left), times in positions.items():
            yield times / 10, source[:, :, top : top + crop[0], left : left + crop[1]]


def scaled_size(image: Size, short_side: int) -> Size:
    """The size of an image brought to this length of its shorter side, the aspect ratio kept."""
    shorter = min(image)
    return round(image[0] * short_side / shorter), round(image[1] * short_side / shorter)


def _multi_scale(crop: Size, image: Size, scales: Sequence[int], key: str) -> Plan:
    sizes = [scaled_size(image, scale) for scale in scales]
    for scale, size in zip(scales, sizes, strict=True):
        if size[0] < crop[0] or size[1] < crop[1]:
            raise UserError(
                f"{key}={scale}: images of {size[0]}x{size[1]} are smaller than the crops of {crop[0]}x{crop[1]}"
            )
    if not sizes:
        raise UserError(f"{key}=[]: at least one scale is needed")

    def views(images: Tensor) -> Iterator[tuple[float, Tensor]]:
        for size in sizes:
            for weight, view in ten_crop(resize(images, size), crop):
                yield weight / len(sizes), view

    return Plan(crop, max(sizes), views)


def _centre(window: Size) -> Crops:
    def views(images: Tensor) -> Iterator[tuple[float, Tensor]]:
        if tuple(images.shape[2:]) == window:
            yield 1.0, images
        else:
            yield 1.0, CentreCrop((images.shape[1], *window))(images, torch.empty(0))[0]

    return views


def _flipped(views: Crops) -> Crops:
    def both(images: Tensor) -> Iterator[tuple[float, Tensor]]:
        for weight, view in views(images):
            yield weight / 2, view
            yield weight / 2, view.flip(3)

    return both
