"""Test-time augmentation: crops of each image, whose outputs are averaged."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import MinLen
from torch import Tensor
from torch.nn.functional import pad

from dlopt.augment.pipeline import CentreCrop
from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count
from dlopt.data.images.resampling import resize

Size = tuple[int, int]  # height, width
Crops = Callable[[Tensor], Iterator[tuple[float, Tensor]]]
"""Yields (weight, crops [B, C, *crop size]) of images [B, C, H, W] in 0..255; the weights add up to 1."""

# He et al. 2015: scales of 224, 256, 384, 480 and 640 for crops of 224.
_SCALE_RATIOS = (1.0, 256 / 224, 384 / 224, 480 / 224, 640 / 224)


@dataclass(frozen=True)
class TestTransform:
    """Crops for images of `image_size`."""

    crop_size: Size
    image_size: Size  # of the largest image that is cropped
    crops: Crops


@dataclass(frozen=True, kw_only=True)
class Flip:
    """The image and its mirror image."""

    def build(self, window: Size, image: Size) -> TestTransform:
        return TestTransform(window, image, _with_flips(window, lambda centre: [(1.0, centre)]))


@dataclass(frozen=True, kw_only=True)
class ShiftFlip:
    """The image (weight 1/2) and its shifts by `shift` pixels to the upper left and the lower right (1/4 each).

    All with their mirror images; the padding is a reflection (Jordan's airbench94, 2024).
    """

    shift: Count = 1  # pixels

    def build(self, window: Size, image: Size) -> TestTransform:
        if self.shift >= min(window):
            raise UserError(f"tta.shift={self.shift}: must be smaller than the images ({window[0]}x{window[1]} pixels)")

        def shifted(centre: Tensor) -> Iterator[tuple[float, Tensor]]:
            (height, width), s = window, self.shift
            padded = pad(centre, (s, s, s, s), mode="reflect")
            yield 0.5, centre
            yield 0.25, padded[:, :, :height, :width]
            yield 0.25, padded[:, :, 2 * s :, 2 * s :]

        return TestTransform(window, image, _with_flips(window, shifted))


@dataclass(frozen=True, kw_only=True)
class TenCrop:
    """Crops of the four corners and the centre, and their mirror images (Krizhevsky et al. 2012).

    scale: length of the image's shorter side before cropping; null: unchanged if the image is larger than the crop,
        otherwise 8/7 of the crop (256 for 224).
    crop: height and width of the crop; null: the size that the model was trained on.
    """

    scale: Count | None = None
    crop: Count | None = None

    def build(self, window: Size, image: Size) -> TestTransform:
        crop = window if self.crop is None else (self.crop, self.crop)
        scale = self.scale
        if scale is None:
            is_larger = image[0] > crop[0] and image[1] > crop[1]
            scale = min(image) if is_larger else round(max(crop) * _SCALE_RATIOS[1])
        return _multi_scale(crop, image, [scale], "tta.scale")


@dataclass(frozen=True, kw_only=True)
class MultiScaleTenCrop:
    """Ten crops at each of several scales of the image's shorter side.

    scales: null: 224, 256, 384, 480 and 640 for crops of 224 (He et al. 2015), in proportion for other sizes.
    crop: see ten_crop.
    """

    scales: Annotated[tuple[Count, ...], MinLen(1)] | None = None
    crop: Count | None = None

    def build(self, window: Size, image: Size) -> TestTransform:
        crop = window if self.crop is None else (self.crop, self.crop)
        scales = [round(max(crop) * ratio) for ratio in _SCALE_RATIOS] if self.scales is None else self.scales
        return _multi_scale(crop, image, scales, "tta.scales")


Augmentation = Flip | ShiftFlip | TenCrop | MultiScaleTenCrop
CHOICES: Mapping[str, type[Augmentation]] = {
    "flip": Flip,
    "shift_flip": ShiftFlip,
    "ten_crop": TenCrop,
    "multi_scale_ten_crop": MultiScaleTenCrop,
}


def ten_crop(images: Tensor, crop: Size) -> Iterator[tuple[float, Tensor]]:
    """Yields the corners and centres of `images` [B, C, H, W], then of their mirror images, with weight 1/10 each.

    Equal positions (an image as large as the crop) are yielded once, with their total weight.
    """
    bottom, right = images.shape[2] - crop[0], images.shape[3] - crop[1]
    centre = round(bottom / 2), round(right / 2)  # as in torchvision's `five_crop`
    positions = Counter([(0, 0), (0, right), (bottom, 0), (bottom, right), centre])
    for source in (images, images.flip(3)):
        for (top, left), multiplicity in positions.items():
            yield multiplicity / 10, source[:, :, top : top + crop[0], left : left + crop[1]]


def _multi_scale(crop: Size, image: Size, scales: Sequence[int], key: str) -> TestTransform:
    shorter = min(image)
    sizes = [(round(image[0] * scale / shorter), round(image[1] * scale / shorter)) for scale in scales]
    for scale, size in zip(scales, sizes, strict=True):
        if size[0] < crop[0] or size[1] < crop[1]:
            raise UserError(
                f"{key}={scale}: resized images ({size[0]}x{size[1]}) are smaller than the crops ({crop[0]}x{crop[1]})"
            )

    def crops(images: Tensor) -> Iterator[tuple[float, Tensor]]:
        for size in sizes:
            for weight, cropped in ten_crop(resize(images.float(), size), crop):
                yield weight / len(sizes), cropped

    return TestTransform(crop, max(sizes), crops)


def _with_flips(window: Size, views: Callable[[Tensor], Iterable[tuple[float, Tensor]]]) -> Crops:
    """Returns the `views` of the centres of images, each with its mirror image."""

    def crops(images: Tensor) -> Iterator[tuple[float, Tensor]]:
        is_whole = tuple(images.shape[2:]) == window
        for weight, view in views(images if is_whole else CentreCrop((images.shape[1], *window)).crop(images)):
            yield weight / 2, view
            yield weight / 2, view.flip(3)

    return crops
