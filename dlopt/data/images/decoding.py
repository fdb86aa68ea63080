"""Decoding and resizing of image files.

Uses PIL only: importing torchvision takes longer than reading a small dataset.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.files import refuse_special

if TYPE_CHECKING:
    from PIL.Image import Image

# A subset of Pillow's formats, for safety: for EPS files, for example, it runs the program Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
_UNSIGNED_16_BITS = ("PNG", "PPM")  # whose images of 16 bits have the mode I, for which TIFF has I;16
_GREY = frozenset(("1", "L", "LA", "I", "I;16", "I;16B", "I;16L"))  # modes
_ORIENTATION = 0x0112  # EXIF tag; values from 5 on swap width and height

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Size = tuple[int, int] | None
"""Height, width; None for an image's own."""
Source = Union[str, bytes, "Image"]
"""Path or content of an image file, or a PIL image."""
Boxes = Callable[[Tensor, Tensor], Tensor]
"""Returns a `Box` of each image, [n, 4], given their heights and widths [n]."""


def size_pair(size: int | Size) -> Size:
    """Returns `image_size` as (height, width); a single number means a square."""
    return (size, size) if isinstance(size, int) else size


class Stored(NamedTuple):
    """How an image file is stored: its size after EXIF rotation, and what decoding drops."""

    height: int
    width: int
    is_grey: bool
    has_alpha: bool
    has_16_bits: bool


def describe(source: str | bytes, name: str) -> Stored:
    """Returns how an image is stored; decodes it only to see whether a pixel is transparent.

    Raises `UserError` that starts with `name`.
    """
    with _naming(name):
        return EncodedImage(source).stored(checks_alpha=True)


def has_colour(content: bytes, name: str) -> bool:
    """Returns whether a pixel of an image has a colour; decodes only images that are not stored as grey.

    Raises `UserError` that starts with `name`.
    """
    with _naming(name):
        image = EncodedImage(content)
        if image.mode in _GREY:
            return False
        pixels = image.decode(None, 3)
    return bool((pixels != pixels[:1]).any())


def decode(source: str | bytes, size: Size, channels: int | None, name: str = "") -> Tensor:
    """Decodes an image, or that of the file `source`, to uint8 [channels, H, W], rotated as its EXIF data says.

    If `size` = (H, W) is given, scales the image to cover it, keeping the aspect ratio, and crops the centre. Lays
    transparent images on white, uses the first frame of animations, and keeps the upper 8 bits of 16-bit grey.
    `channels`: None for the image's own. `name`: for messages, if the source is the content of a file.

    Raises:
        UserError: the file cannot be read as an image, or its pixels are numbers without a white (see `from_pil`).
    """
    with _naming(name or str(source)):
        return EncodedImage(source).decode(size, channels)


def decode_described(source: Source, name: str, size: tuple[int, int], channels: int) -> tuple[Tensor, Stored]:
    """Like `decode`; also returns how the image is stored, according to its header. `name`: for messages."""
    with _naming(name):
        image = EncodedImage(source)
        stored = image.stored()
        return image.decode(size, channels), stored


def decode_boxes(paths: Sequence[str], boxes: Boxes, size: tuple[int, int], channels: int) -> Iterator[Tensor]:
    """Decodes a box of each image, resized to uint8 [channels, *size] as by Pillow, bilinear with anti-aliasing.

    Args:
        boxes: returns the boxes, given the sizes of the images.

    Raises:
        UserError: a file cannot be read as an image.
    """
    images = []
    for path in paths:
        with _naming(path):
            images.append(EncodedImage(path))
    heights, widths = (torch.tensor([getattr(image, name) for image in images]) for name in ("height", "width"))
    for path, image, box in zip(paths, images, boxes(heights, widths).tolist(), strict=True):
        with _naming(path):
            yield image.decode(size, channels, box)


def header_size(path: str) -> tuple[int, int]:
    """Returns (height, width) of the image in `path` after EXIF rotation, without decoding it.

    Raises:
        UserError: the file cannot be read as an image.
    """
    from PIL import Image

    with _naming(path):
        refuse_special(path)
    with _naming(path), Image.open(path, formats=_formats()) as image:
        width, height = image.size
        return (width, height) if orientation(image) >= 5 else (height, width)


@cache
def _formats() -> list[str]:
    """Returns the `_FORMATS` that this Pillow supports: Image.open() rejects unknown names."""
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def from_pil(image: "Image", channels: int | None = None) -> Tensor:
    """Converts a PIL image to uint8 [C, H, W]; `channels` None: 1 for grey images, else 3.

    Raises `ValueError` for floating-point, 32-bit and signed pixels: nothing defines which of their values is white, so
    0..1 or 100..400 would become black or white images.
    """
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format not in _UNSIGNED_16_BITS):
        low, high = image.getextrema()
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise ValueError(f"{kind} pixels from {low:g} to {high:g}; convert them to 8 or 16 bits")
    if channels is None:
        channels = 1 if image.mode in _GREY else 3
    if image.mode.startswith("I"):  # 16-bit grey: converting would clip at 255 instead of scaling
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if _has_alpha(image):  # converting would show the colours of invisible pixels
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1).contiguous()


def _has_alpha(image: "Image") -> bool:
    """Returns whether an image may have transparent pixels."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


class EncodedImage:
    """An image file in memory: its size after EXIF rotation is known, its pixels are decoded later.

    `source`: the path of the file, or its content; or an image that Pillow has opened, which stays as it is.
    """

    def __init__(self, source: Source) -> None:
        from PIL import Image

        if isinstance(source, str):
            refuse_special(source)
            source = Path(source).read_bytes()
        opened = Image.open(io.BytesIO(source), formats=_formats()) if isinstance(source, bytes) else source.copy()
        self._image: Image.Image = opened
        self._image.format = opened.format if isinstance(source, bytes) else source.format
        self._orientation = orientation(self._image)
        self.mode = self._image.mode
        width, height = self._image.size
        self.height, self.width = (width, height) if self._orientation >= 5 else (height, width)

    def stored(self, *, checks_alpha: bool = False) -> Stored:
        """Returns how the image is stored. `checks_alpha`: decodes transparency, which may be nowhere."""
        image = self._image
        has_alpha = _has_alpha(image)
        # The mode in the file, such as RGB;16B, which Pillow reduces to 8 bits.
        _, _, _, raw = next(iter(getattr(image, "tile", None) or [(None, None, None, "")]))
        raw = raw[0] if isinstance(raw, tuple) and raw else raw
        if has_alpha and checks_alpha:
            has_alpha = image.convert("RGBA").getchannel("A").getextrema()[0] != 255
        return Stored(
            self.height, self.width, self.mode in _GREY, has_alpha, image.mode.startswith("I") or ";16" in str(raw)
        )

    def decode(self, size: Size, channels: int | None, box: Box | None = None) -> Tensor:
        """Returns `box` (left, top, right, bottom; None: the largest centred one) as uint8 [channels, *size].

        `size` None for the whole image, unchanged. Call once.
        """
        from PIL import Image, ImageOps

        image = self._image
        is_whole = box is None and size in (None, (self.height, self.width))
        shrink = 1.0
        if size is not None and not is_whole:
            box = centre_box(self.width, self.height, size) if box is None else box
            if image.format == "JPEG":
                # Lets the decoder downscale large images by powers of two, to no less than twice the target size.
                scale = 2 * max(size[0] / (box[3] - box[1]), size[1] / (box[2] - box[0]))
                width, height = image.size
                if scale < 1 and (draft := image.draft(None, (round(width * scale), round(height * scale)))):
                    shrink = draft[1][2] / width
        if self._orientation > 1:
            image = ImageOps.exif_transpose(image)
            image.format = self._image.format
        if size is None or is_whole:
            return from_pil(image, channels)
        assert box is not None
        # A draft has a part of a pixel too much at the right and the bottom, which mirroring moves.
        left = (image.width - self.width * shrink) * (self._orientation in (2, 3, 6, 7))
        top = (image.height - self.height * shrink) * (self._orientation in (3, 4, 7, 8))
        edges = [start + edge * shrink for start, edge in zip((left, top) * 2, box, strict=True)]
        # Pillow refuses a box that rounding has moved out of the image.
        box = max(edges[0], 0.0), max(edges[1], 0.0), min(edges[2], image.width), min(edges[3], image.height)
        if image.mode not in ("L", "RGB") or _has_alpha(image):
            pixels = from_pil(image, channels).permute(1, 2, 0)
            image = Image.fromarray(pixels.squeeze(-1).contiguous().numpy())
        return from_pil(image.resize(size[::-1], Image.Resampling.BILINEAR, box=box), channels)


def centre_box(width: int, height: int, size: tuple[int, int]) -> Box:
    """Returns the largest centred box of an image that has the aspect ratio of `size` = (H, W)."""
    scale = min(height / size[0], width / size[1])
    box_width, box_height = scale * size[1], scale * size[0]
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def orientation(image: "Image") -> int:
    """Returns the EXIF orientation of an image, 1 to 8; 1: as it is stored."""
    found = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
    return found if found in range(1, 9) else 1  # damaged EXIF data may contain anything


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turns any exception into a `UserError` that names the file."""
    try:
        yield
    except Exception as error:  # on damaged files decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or str(error).split("<_io.BytesIO")[0].strip() or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from error
