import struct
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from dlopt.basics.errors import UserError
from dlopt.data.checks import IMAGE_EXTENSIONS
from dlopt.data.images.decoding import _formats, centre_box, decode, decode_boxes, from_pil, header_size
from dlopt.data.images.resampling import resize


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1).astype(np.uint8)


def test_native_size_keeps_every_pixel(tmp_path: Path) -> None:
    pixels = gradient(7, 9)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(decode(str(tmp_path / "a.png"), None, 3), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("height, width", [(40, 90), (90, 40), (33, 33), (300, 520)])
@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_scales_to_cover_and_crops_the_centre(tmp_path: Path, height: int, width: int, size: tuple[int, int]) -> None:
    """In a linear gradient, the value of a pixel is its source position."""
    Image.fromarray(gradient(height, width)).save(tmp_path / "a.png")
    ours = decode(str(tmp_path / "a.png"), size, 3).float()
    scale = min(height / size[0], width / size[1])
    rows = height / 2 + scale * (torch.arange(size[0]) + 0.5 - size[0] / 2) - 0.5
    columns = width / 2 + scale * (torch.arange(size[1]) + 0.5 - size[1] / 2) - 0.5
    inner = slice(2, -2)  # at the borders less than a full window is averaged
    assert (ours[0, inner, 0] - rows[inner] * 255 / height).abs().max() <= 1.5
    assert (ours[1, 0, inner] - columns[inner] * 255 / width).abs().max() <= 1.5


def in_pillow(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Scales an image to cover `size` and crops the centre, to fractions of a pixel: [*size] or [*size, 3]."""
    scale = min(image.height / size[0], image.width / size[1])
    top, left = (image.height - scale * size[0]) / 2, (image.width - scale * size[1]) / 2
    box = (left, top, left + scale * size[1], top + scale * size[0])
    box = (max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box=box))


@pytest.mark.parametrize("size", [(6, 6), (28, 28), (11, 7), (5, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_and_arrays_are_scaled_alike(tmp_path: Path, channels: int, size: tuple[int, int]) -> None:
    """Small images, whose centre is not at whole pixels: equal to Pillow to the last bit."""
    generator = np.random.default_rng(0)
    for height, width in ((8, 19), (19, 8), (9, 14), (13, 11), (17, 16)):
        shape = (height, width) if channels == 1 else (height, width, 3)
        image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        image.save(tmp_path / "a.png")
        expected = torch.from_numpy(in_pillow(image, size).copy()).view(*size, channels).permute(2, 0, 1)
        pixels = from_pil(image)
        content = (tmp_path / "a.png").read_bytes()
        assert torch.equal(decode(str(tmp_path / "a.png"), size, channels), expected)
        assert torch.equal(decode(content, size, None, "a"), expected)
        assert torch.equal(resize(torch.stack([pixels, 255 - pixels])[:1], size)[0], expected)
        assert (resize(pixels.double(), size) - expected).abs().max() <= 1  # Pillow rounds after each axis


ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""How an upright image is stored with each EXIF orientation."""


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_large_jpeg_is_cropped_alike_in_every_orientation(tmp_path: Path, size: tuple[int, int]) -> None:
    """The decoder downscales 1201 columns to 151, of which the last one is an eighth."""
    rows, columns = np.mgrid[0:803, 0:1201]
    pixels = [127 + 120 * np.sin(columns / 97) * np.cos(rows / 71), 127 + 120 * np.cos(columns / 53 + rows / 91)]
    upright = Image.fromarray(np.stack([*pixels, columns * 255 / 1201], -1).astype(np.uint8))
    expected = in_pillow(upright, size).astype(int)
    for orientation in range(1, 9):
        image = upright if orientation == 1 else upright.transpose(ORIENTATIONS[orientation])
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "a.jpg", exif=exif, quality=95)
        found = decode(str(tmp_path / "a.jpg"), size, 3).permute(1, 2, 0).numpy()
        assert np.abs(found - expected).mean() < 0.5, orientation
        assert np.abs(found - expected).max() <= 6, orientation


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
@pytest.mark.parametrize("size", [None, (2, 2), (3, 5)])
def test_hidden_colours_stay_hidden(tmp_path: Path, mode: str, size: tuple[int, int] | None) -> None:
    """Two images that look alike, with other colours where they are transparent."""
    pixels = {}
    for name, hidden in (("black", 0), ("grey", 90)):
        shown = np.full((6, 6), 200, np.uint8)
        shown[:, 3:] = hidden
        image = Image.fromarray(shown)
        keys = {}
        if mode in ("L", "RGB", "P"):
            image = image.convert(mode)
            keys["transparency"] = (hidden,) * 3 if mode == "RGB" else hidden
        else:
            image = Image.merge("LA", (image, Image.fromarray(np.uint8(shown == 200) * 255))).convert(mode)
        image.save(tmp_path / f"{name}.png", **keys)
        pixels[name] = decode(str(tmp_path / f"{name}.png"), size, 3)
    assert torch.equal(pixels["black"], pixels["grey"])
    if size is None:
        assert pixels["grey"].unique().tolist() == [200, 255] and pixels["grey"][:, :, 3:].unique().tolist() == [255]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0], pixels[0, :, 3] = 100, (0, 51, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    red, green, _ = decode(str(tmp_path / "a.png"), None, 3)[:, 0].tolist()
    assert red == [255, 255 - 31, 100] and green == [255, 204, 0]


def test_a_large_jpeg_is_decoded_at_reduced_size_without_visible_change(tmp_path: Path) -> None:
    smooth = gradient(640, 960)
    smooth[..., 2] = 0
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(smooth).save(tmp_path / "a.png")
    jpeg, png = (decode(str(tmp_path / name), (32, 32), 3).float() for name in ("a.jpg", "a.png"))
    assert (jpeg - png).abs().max() <= 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (4, 4)])
def test_every_mode_converts_to_the_requested_channels(mode: str, channels: int, size: tuple[int, int] | None) -> None:
    image = Image.fromarray(gradient(8, 8)).convert(mode)
    assert from_pil(image, channels).shape == (channels, 8, 8)


def test_palette_with_transparency_does_not_warn(tmp_path: Path) -> None:
    image = Image.fromarray(gradient(8, 8)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(str(tmp_path / "a.png"), None, 3).shape == (3, 8, 8)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        ours = decode(str(tmp_path / name), None, 1)
        assert torch.equal(ours[0], torch.from_numpy((values >> 8).astype(np.uint8)))


@pytest.mark.parametrize("low, high", [(np.float32(0), np.float32(1)), (np.float32(-1e4), np.float32(1e4)),
                                       (np.int32(100), np.int32(400)), (np.int32(0), np.int32(0))])  # fmt: skip
@pytest.mark.parametrize("suffix", [".tif", ".pfm"])
def test_pixels_without_a_white_are_refused(tmp_path: Path, low: np.generic, high: np.generic, suffix: str) -> None:
    pixels = np.full((4, 4), low)
    pixels[0] = high
    image = Image.fromarray(pixels)
    if suffix == ".tif" or pixels.dtype == np.float32:
        image.save(tmp_path / f"x{suffix}", format="PPM" if suffix == ".pfm" else None)
        for size in (None, (2, 2)):
            with pytest.raises(UserError, match=r"pixels from .*; convert them to 8 or 16 bits"):
                decode(str(tmp_path / f"x{suffix}"), size, 3)
    with pytest.raises(ValueError, match=rf"pixels from {low:g} to {high:g}; convert"):
        from_pil(image)


def test_every_format_has_its_extensions() -> None:
    Image.init()
    assert {name for name, format in Image.registered_extensions().items() if format in _formats()} <= IMAGE_EXTENSIONS


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; a quarter turn clockwise makes it upright
    lying = np.zeros((16, 32, 3), np.uint8)
    lying[:, :8] = 255  # its left edge, which becomes the upper edge
    Image.fromarray(lying).save(tmp_path / "a.jpg", exif=exif, quality=95)
    path = str(tmp_path / "a.jpg")
    upright = decode(path, None, 1)
    assert header_size(path) == (32, 16) and upright.shape == (1, 32, 16)
    assert upright[0, :6].float().mean() > 240 and upright[0, 10:].float().mean() < 15
    assert decode(path, (8, 4), 1)[0, 0].float().mean() > 200


@pytest.mark.parametrize(
    "exif",
    [
        b"no TIFF header",
        b"II*\0" + struct.pack("<I", 9999),  # the directory is after the end of the file
        b"II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, 2, 2, b"6\0\0\0", 0),  # a text
        b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 77, 0, 0),  # none of the eight
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_is_ignored(tmp_path: Path, exif: bytes) -> None:
    Image.new("L", (6, 4), 77).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    path = str(tmp_path / "a.jpg")
    assert header_size(path) == (4, 6) and decode(path, None, 1).unique().tolist() == [77]


def test_error_names_a_broken_file_in_one_line(tmp_path: Path) -> None:
    """Files that are damaged in other ways are in test_hard_images.py."""
    Image.fromarray(gradient(64, 64)).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "folder.jpg").mkdir()
    for name in ("cut.png", "folder.jpg", "missing.jpg"):
        with pytest.raises(UserError) as caught:
            decode(str(tmp_path / name), (8, 8), 3)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: cannot be read as an image (") and "\n" not in message


def test_no_image_starts_a_program(tmp_path: Path) -> None:
    """Pillow opens EPS files by Ghostscript, whatever their extension."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, format="EPS")
    with patch("subprocess.check_call") as call, patch("subprocess.Popen") as opened:
        for read in (lambda: decode(str(path), (4, 4), 3), lambda: header_size(str(path))):
            with pytest.raises(UserError, match=r"a\.png: cannot be read as an image"):
                read()
    assert not call.called and not opened.called


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_other_modes_are_converted_before_they_are_resized(tmp_path: Path, mode: str, channels: int) -> None:
    image = Image.fromarray(gradient(16, 16))
    if mode == "I;16":
        image = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 256)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "a.tif")
    whole = decode(str(tmp_path / "a.tif"), None, channels)
    resized = decode(str(tmp_path / "a.tif"), (4, 8), channels)
    assert whole.shape == (channels, 16, 16) and resized.shape == (channels, 4, 8)
    converted = Image.fromarray(whole.permute(1, 2, 0).squeeze(2).numpy())
    expected = from_pil(converted.resize((8, 4), Image.Resampling.BILINEAR, box=(0, 4, 16, 12)), channels)
    assert torch.equal(resized, expected)


def test_a_box_that_rounding_moves_out_of_the_image(tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        Image.fromarray(gradient(200, 300)).save(tmp_path / f"a.{suffix}", quality=100)
        box = (-1e-6, -1e-6, 300.000001, 200.000001)
        paths = [str(tmp_path / f"a.{suffix}")] * 2
        boxes = torch.tensor([box, (30.0, 20.0, 90.0, 60.0)])
        found = list(decode_boxes(paths, lambda *_, boxes=boxes: boxes, (20, 30), 3))
        assert (found[0].int() - decode(paths[0], (20, 30), 3).int()).abs().max() <= 2
        column = found[1][1].float()  # the value of a column is its position
        assert abs(float(column[:, 0].mean()) - 31 * 255 / 300) < 2
        assert abs(float(column[:, -1].mean()) - 89 * 255 / 300) < 2


@pytest.mark.parametrize("size", [(2, 100), (100, 2)])
def test_a_box_may_be_narrower_than_a_pixel(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10))
    left, top, right, bottom = centre_box(10, 10, size)
    assert min(right - left, bottom - top) < 1
    assert np.array_equal(resize(from_pil(image), size)[0], in_pillow(image, size))
