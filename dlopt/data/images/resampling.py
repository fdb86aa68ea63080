"""Anti-aliased bilinear resampling along the axes of an image, as in Pillow and torchvision."""

import math

import numpy as np
import torch
from torch import Tensor

from dlopt.data.images.decoding import Box, centre_box

Taps = list[tuple[Tensor, Tensor]]
"""Input pixels and their weights, each [b or 1, n]: an output pixel is the weighted sum over the list."""


def filter_taps(centres: Tensor, scale: Tensor | float, length: int, shrink: float) -> Taps:
    """Returns the taps of the output pixels along one axis.

    The filter is a triangle whose half width is the distance of the output pixels in input pixels, but at least one
    pixel: shrinking averages all pixels, enlarging interpolates between two. The weights of the pixels within the image
    add up to 1.

    Args:
        centres: [b or 1, n] positions of the output pixels, within 0..length; pixel j covers j..j + 1.
        scale: [b, 1], or one number: distance of neighbouring output pixels; its sign does not matter.
        length: pixels of the input.
        shrink: upper bound of `scale`.
    """
    width = scale.abs().clamp(min=1.0) if isinstance(scale, Tensor) else max(abs(scale), 1.0)
    first = (centres - width - 0.5).ceil()
    count = math.ceil(2 * max(shrink, 1.0) - 1e-6)
    pixels = [first + number for number in range(count)]
    weights = [(1.0 - (pixel + 0.5 - centres).abs() / width).clamp(min=0.0) for pixel in pixels]
    weights = [weight * ((pixel >= 0) & (pixel < length)) for pixel, weight in zip(pixels, weights, strict=True)]
    total = torch.stack(weights).sum(0)
    return [(pixel.clamp(0, length - 1).long(), weight / total) for pixel, weight in zip(pixels, weights, strict=True)]


def resample(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Resamples images [b, C, H, W], float, to [b, C, H', W']."""
    # Sums of elementwise products: a batched matrix product would run in TF32 or bf16, and would not be faster.
    narrow = _weighted_sum(images, 3, [(pixels[:, None, None], weights[:, None, None]) for pixels, weights in columns])
    return _weighted_sum(narrow, 2, [(pixels[:, None, :, None], weights[:, None, :, None]) for pixels, weights in rows])


def _weighted_sum(images: Tensor, axis: int, taps: Taps) -> Tensor:
    size = list(images.shape)
    size[axis] = taps[0][0].shape[axis]
    result: Tensor | None = None
    for pixels, weights in taps:
        term = images.gather(axis, pixels.expand(size)) * weights
        result = term if result is None else result.add_(term)
    assert result is not None
    return result


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scales images [..., H, W] to cover `size` = (H', W'), keeping the aspect ratio, and crops the centre.

    Keeps the dtype: uint8 as Pillow reads image files, others without rounding.
    """
    height, width = images.shape[-2:]
    return images if (height, width) == size else resize_box(images, centre_box(width, height, size), size)


def resize_box(images: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """Resizes the box (left, top, right, bottom) of images [..., H, W] to [..., *size]; keeps the dtype."""
    planes = images.reshape(-1, *images.shape[-2:])
    if images.dtype == torch.uint8:  # as image files: Pillow rounds after each axis
        from PIL import Image

        # As in `EncodedImage.decode`, within the image.
        box = max(box[0], 0.0), max(box[1], 0.0), min(box[2], images.shape[-1]), min(box[3], images.shape[-2])
        pictures = (Image.fromarray(plane) for plane in planes.cpu().numpy())
        resized = [np.array(each.resize(size[::-1], Image.Resampling.BILINEAR, box=box)) for each in pictures]
        return torch.from_numpy(np.stack(resized)).view(*images.shape[:-2], *size)
    left, top, right, bottom = box
    rows, columns = (
        filter_taps(start + step * (torch.arange(n, device=images.device)[None] + 0.5), step, length, step)
        for start, step, n, length in (
            (top, (bottom - top) / size[0], size[0], images.shape[-2]),
            (left, (right - left) / size[1], size[1], images.shape[-1]),
        )
    )
    return resample(planes[None].float(), rows, columns)[0].view(*images.shape[:-2], *size).to(images.dtype)
