import struct
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dlopt.basics.errors import UserError
from dlopt.data.checks import IMAGE_EXTENSIONS
from dlopt.data.images import _centre_box, _formats, decode, decode_boxes, from_pil, header_size, resize


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


@pytest.mark.parametrize("height, width", [(40, 90), (33, 33), (8, 8), (300, 520)])
@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_resize_matches_torchvision(height: int, width: int, size: tuple[int, int]) -> None:
    images = torch.from_numpy(gradient(height, width)).permute(2, 0, 1)[None]
    left, top, right, bottom = (round(edge) for edge in _centre_box(width, height, size))
    expected = v2.functional.resize(images[..., top:bottom, left:right].float(), list(size), antialias=True)
    assert (resize(images, size).float() - expected).abs().max() <= 0.5
    assert (resize(images.float(), size) - expected).abs().max() == 0


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
def test_a_crop_has_at_least_one_row_and_column(size: tuple[int, int]) -> None:
    """A box that is narrower than a pixel is that pixel, without its neighbour."""
    images = torch.arange(100, dtype=torch.float32).view(1, 1, 10, 10)
    resized = resize(images, size)
    assert resized.shape == (1, 1, *size)
    line = images[0, 0, 5] if size[0] == 2 else images[0, 0, :, 5]
    for each in resized[0, 0] if size[0] == 2 else resized[0, 0].T:
        assert each[0] == line[0] and each[-1] == line[-1]
