"""Kinds of difficult image files: each is read correctly, or reported with its path."""

import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.images.decoding import decode
from dlopt.data.images.folder import image_folder
from dlopt.data.samples import Dataset

SIZE = (24, 32)
COLOUR = (200, 100, 50)


def plain(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", SIZE[::-1], COLOUR).convert(mode)


def jpeg(folder: Path) -> bytes:
    path = folder / "source.jpeg"
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.unlink()
    return data


def animation(path: Path) -> None:
    later = Image.new("RGB", SIZE[::-1], (0, 0, 255))
    plain().save(path, format="GIF", save_all=True, append_images=[later])


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    lying[:, : SIZE[0] // 2] = COLOUR  # its left half, which becomes the upper half
    Image.fromarray(lying).save(path, exif=exif, quality=95, subsampling=0)


def bomb(path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(100_000))
    chunks = (
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in (header, pixels)
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def is_colour(image: Tensor) -> bool:
    return bool(((image.float() - torch.tensor(COLOUR).view(3, 1, 1)).abs() <= 6).all())


def is_upright(image: Tensor) -> bool:
    edge = SIZE[0] // 2
    return is_colour(image[:, : edge - 4]) and bool((image[:, edge + 4 :] < 10).all())


def png(image: Image.Image, **keys: Any) -> Callable[[Path], None]:
    return lambda path: image.save(path, format="PNG", **keys)


READ: dict[str, tuple[Callable[[Path], None], Callable[[Tensor], bool]]] = {
    "wrong_extension": (png(plain()), is_colour),
    "cmyk": (lambda path: plain("CMYK").save(path, quality=95), is_colour),
    "grey_16_bit": (
        png(Image.fromarray(np.full(SIZE, 200 << 8, dtype=np.uint16))),
        lambda image: bool((image == 200).all()),
    ),
    "one_bit": (png(Image.new("1", SIZE[::-1], 1)), lambda image: bool((image == 255).all())),
    "palette_with_transparency": (png(plain().quantize(2), transparency=bytes([255] * 256)), is_colour),
    "animation": (animation, is_colour),
    "rotated": (rotated, is_upright),
    "one_pixel": (png(Image.new("RGB", (1, 1), COLOUR)), is_colour),
    "extreme_aspect": (png(Image.new("RGB", (5000, 1), COLOUR)), is_colour),
    "extreme_height": (png(Image.new("RGB", (1, 3000), COLOUR)), is_colour),
}
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "zero_byte": (lambda path: path.write_bytes(b""), "cannot identify image file"),
    "truncated_head": (lambda path: path.write_bytes(jpeg(path.parent)[:20]), "(?i)truncated|cannot identify"),
    "truncated_body": (
        lambda path: path.write_bytes(jpeg(path.parent)[: len(jpeg(path.parent)) // 2]),
        "(?i)truncated",
    ),
    "wrong_header": (lambda path: path.write_bytes(b"\0" * 20 + jpeg(path.parent)[20:]), "cannot identify image file"),
    "bomb": (bomb, "decompression bomb"),
    "text": (lambda path: path.write_text("this is no image\n"), "cannot identify image file"),
}


@pytest.mark.parametrize("name", READ)
def test_reads_correctly(tmp_path: Path, name: str) -> None:
    path, (write, holds) = tmp_path / "image.jpg", READ[name]
    write(path)
    image = decode(str(path), SIZE, 3)
    assert image.shape == (3, *SIZE) and image.dtype == torch.uint8 and holds(image)


@pytest.mark.parametrize("name", BROKEN)
def test_error_names_the_path_in_one_line(tmp_path: Path, name: str) -> None:
    path, (write, reason) = tmp_path / "image.jpg", BROKEN[name]
    write(path)
    with pytest.raises(UserError, match=reason) as caught:
        decode(str(path), SIZE, 3)
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be read as an image (") and "\n" not in message


def test_error_names_missing_permission() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        os.chmod(folder, 0o755)
        closed, opened = Path(folder) / "closed.jpg", Path(folder) / "opened.jpg"
        plain().save(closed)
        closed.chmod(0)
        plain().save(opened)
        opened.chmod(0o644)
        if as_ordinary_user(opened) != "was read":
            pytest.skip("needs a folder that an ordinary user may enter")
        assert as_ordinary_user(closed) == f"{closed}: cannot be read as an image (Permission denied)"


def as_ordinary_user(path: Path) -> str:
    """Returns the error of `decode` in a child process without root rights, which ignore permissions."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            decode(str(path), SIZE, 3)
            os.write(send, b"was read")
        except BaseException as error:
            os.write(send, str(error).encode())
        finally:
            os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    with os.fdopen(receive, "rb") as answer:
        return answer.read().decode()


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """All kinds except the one without permission in the class `hard`, among good images; one broken test image."""
    for name in ("train/hard", "train/easy", "test/hard", "test/easy"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(3):
            plain().save(tmp_path / name / f"a{number}.png")
    for name, (write, _) in (READ | BROKEN).items():
        write(tmp_path / "train/hard" / f"{name}.jpg")
    (tmp_path / "test/easy/text.jpg").write_text("this is no image\n")
    return tmp_path


def load(root: Path, max_skips: int | float, size: tuple[int, int] | None = SIZE) -> Dataset:
    return image_folder(root=str(root), channels=3, on_error="skip", max_skips=max_skips, image_size=size)


@pytest.mark.parametrize("max_skips", [7, 0.26])
def test_unreadable_images_are_skipped_and_listed(collection: Path, max_skips: int | float) -> None:
    data = load(collection, max_skips)
    assert data.test is not None
    assert (
        data.train.targets.tolist() == [0] * 3 + [1] * (3 + len(READ))
        and data.test.targets.tolist() == [0] * 3 + [1] * 3
    )
    assert data.train.fetch(torch.arange(len(data.train))).shape == (16, 3, *SIZE)
    assert data.notes[0] == "data.on_error=skip: skipped 7 of 29 images, which cannot be read:"
    expected = [collection / "train/hard" / f"{name}.jpg" for name in sorted(BROKEN)]
    for line, path in zip(data.notes[1:], [*expected, collection / "test/easy/text.jpg"], strict=True):
        assert line.startswith(f"  {path}: cannot be read as an image (")


@pytest.mark.parametrize("max_skips, cap", [(6, 6), (0, 0), (0.24, 6)])
def test_max_skips_limits_skipped_images(collection: Path, max_skips: int | float, cap: int) -> None:
    message = (
        rf"data.max_skips={max_skips}: more than {cap} of 29 images cannot be read.*{collection}/train/hard/bomb.jpg"
    )
    with pytest.raises(UserError, match=message):
        load(collection, max_skips)


def test_a_broken_first_image_does_not_hide_the_common_size(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/0.jpg").touch()
    for number in (1, 2):
        plain().save(tmp_path / f"train/a/{number}.png")
    assert load(tmp_path, 1, None).train.shape == (3, *SIZE)


def test_rejects_losing_a_whole_class(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        plain().save(tmp_path / "train" / name / "0.png")
    (tmp_path / "train/b/0.png").write_text("this is no image\n")
    with pytest.raises(UserError, match=rf"no train image of one class can be read: {tmp_path}/train/b/0.png: cannot"):
        load(tmp_path, 1.0)
