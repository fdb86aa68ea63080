"""A batch of images as one picture."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_SIDE = 512  # pixels: small images are enlarged up to this, and of large ones fewer are shown (but at least four)


def image_grid(images: "Tensor") -> "Image":
    """[B, C, H, W] -> a picture of at most 64 images in a square grid, one pixel of border between them.

    uint8 is taken as 0..255; float as 0..1, or, where values lie outside (normalized input), stretched from the
    0.2 % to the 99.8 % quantile of what is shown. One or three channels; of any other number the first is shown.
    """
    import torch
    from PIL import Image

    batch, channels, height, width = images.shape
    columns = min(max(_SIDE // max(height, width), 2), 8, math.ceil(math.sqrt(batch)))
    rows = min(columns, math.ceil(batch / columns))
    shown = images[: rows * columns].detach().cpu()
    if channels not in (1, 3):
        shown = shown[:, :1]
    if shown.dtype != torch.uint8:
        shown = _to_uint8(shown)
    shown = shown.permute(0, 2, 3, 1)

    picture = Image.new("RGB", (columns * (width + 1) - 1, rows * (height + 1) - 1), "white")
    for index, pixels in enumerate(shown.numpy()):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        picture.paste(image, (index % columns * (width + 1), index // columns * (height + 1)))
    enlarge = _SIDE // max(picture.size)
    if enlarge > 1:
        picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    elif max(picture.size) > 2 * _SIDE:
        picture.thumbnail((2 * _SIDE, 2 * _SIDE))
    return picture


def _to_uint8(images: "Tensor") -> "Tensor":
    images = images.float().nan_to_num(0.0, 0.0, 0.0)
    if images.numel() and (images.min() < 0 or images.max() > 1):
        ordered = images.flatten().sort().values
        last = ordered.numel() - 1
        low, high = ordered[round(0.002 * last)], ordered[round(0.998 * last)]
        images = (images - low) / (high - low).clamp(min=1e-12)
    return (images.clamp(0, 1) * 255).round().byte()
