"""Sixteen kinds of difficult image files: each is read correctly, or reported with its path."""

import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dlopt.data.folder import image_folder
from dlopt.data.images import decode
from dlopt.data.samples import Dataset
from dlopt.errors import UserError

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


def zero_byte(path: Path) -> None:
    path.write_bytes(b"")


def truncated_head(path: Path) -> None:
    path.write_bytes(jpeg(path.parent)[:20])


def truncated_body(path: Path) -> None:
    data = jpeg(path.parent)
    path.write_bytes(data[: len(data) // 2])


def wrong_header(path: Path) -> None:
    path.write_bytes(b"\0" * 20 + jpeg(path.parent)[20:])


def wrong_extension(path: Path) -> None:
    plain().save(path, format="PNG")


def cmyk(path: Path) -> None:
    plain("CMYK").save(path, quality=95)


def grey_16_bit(path: Path) -> None:
    Image.fromarray(np.full(SIZE, 200 << 8, dtype=np.uint16)).save(path, format="PNG")


def one_bit(path: Path) -> None:
    Image.new("1", SIZE[::-1], 1).save(path, format="PNG")


def palette_with_transparency(path: Path) -> None:
    plain().quantize(2).save(path, format="PNG", transparency=bytes(range(256)))


def animation(path: Path) -> None:
    later = Image.new("RGB", SIZE[::-1], (0, 0, 255))
    plain().save(path, format="GIF", save_all=True, append_images=[later])


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    lying[:, : SIZE[0] // 2] = COLOUR  # its left half, which becomes the upper half
    Image.fromarray(lying).save(path, exif=exif, quality=95, subsampling=0)


def one_pixel(path: Path) -> None:
    Image.new("RGB", (1, 1), COLOUR).save(path, format="PNG")


def extreme_aspect(path: Path) -> None:
    Image.new("RGB", (5000, 1), COLOUR).save(path, format="PNG")


def bomb(path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(100_000))
    chunks = (
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in (header, pixels)
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def text(path: Path) -> None:
    path.write_text("this is no image\n")


def unreadable(path: Path) -> None:
    plain().save(path)
    path.chmod(0)


def is_colour(image: Tensor) -> bool:
    return bool(((image.float() - torch.tensor(COLOUR).view(3, 1, 1)).abs() <= 6).all())


def is_white(image: Tensor) -> bool:
    return bool((image == 255).all())


def is_grey(image: Tensor) -> bool:
    return bool((image == 200).all())


def is_upright(image: Tensor) -> bool:
    edge = SIZE[0] // 2
    return is_colour(image[:, : edge - 4]) and bool((image[:, edge + 4 :] < 10).all())


Write: TypeAlias = Callable[[Path], None]
Holds: TypeAlias = Callable[[Tensor], bool]


def name_of(write: Write) -> str:
    return write.__name__


READ: dict[Write, Holds] = {
    wrong_extension: is_colour,
    cmyk: is_colour,
    grey_16_bit: is_grey,
    one_bit: is_white,
    palette_with_transparency: is_colour,
    animation: is_colour,
    rotated: is_upright,
    one_pixel: is_colour,
    extreme_aspect: is_colour,
}
NAMED: dict[Write, str] = {
    zero_byte: "cannot identify image file",
    truncated_head: "(?i)truncated|cannot identify",
    truncated_body: "(?i)truncated",
    wrong_header: "cannot identify image file",
    bomb: "decompression bomb",
    text: "cannot identify image file",
}


@pytest.mark.parametrize("write", READ, ids=name_of)
def test_reads_correctly(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "image.jpg"
    write(path)
    image = decode(str(path), SIZE, 3)
    assert image.shape == (3, *SIZE) and image.dtype == torch.uint8 and READ[write](image)


@pytest.mark.parametrize("write", NAMED, ids=name_of)
def test_error_names_the_path_in_one_line(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "image.jpg"
    write(path)
    with pytest.raises(UserError, match=NAMED[write]) as caught:
        decode(str(path), SIZE, 3)
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot be read as an image (") and "\n" not in message


def test_error_names_missing_permission() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        os.chmod(folder, 0o755)
        closed, opened = Path(folder) / "closed.jpg", Path(folder) / "opened.jpg"
        unreadable(closed)
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
    for write in (*READ, *NAMED):
        write(tmp_path / "train/hard" / f"{name_of(write)}.jpg")
    text(tmp_path / "test/easy/text.jpg")
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
    assert data.train.fetch(torch.arange(len(data.train))).shape == (15, 3, *SIZE)
    assert data.notes[0] == "data.on_error=skip: skipped 7 of 28 images, which cannot be read:"
    expected = [collection / "train/hard" / f"{name_of(write)}.jpg" for write in sorted(NAMED, key=name_of)]
    for line, path in zip(data.notes[1:], [*expected, collection / "test/easy/text.jpg"], strict=True):
        assert line.startswith(f"  {path}: cannot be read as an image (")


@pytest.mark.parametrize("max_skips, cap", [(6, 6), (0, 0), (0.249, 6)])
def test_max_skips_limits_skipped_images(collection: Path, max_skips: int | float, cap: int) -> None:
    message = (
        rf"data.max_skips={max_skips}: more than {cap} of 28 images cannot be read.*{collection}/train/hard/bomb.jpg"
    )
    with pytest.raises(UserError, match=message):
        load(collection, max_skips)


def test_a_broken_first_image_does_not_hide_the_common_size(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    zero_byte(tmp_path / "train/a/0.jpg")
    for number in (1, 2):
        plain().save(tmp_path / f"train/a/{number}.png")
    assert load(tmp_path, 1, None).train.shape == (3, *SIZE)


def test_rejects_losing_a_whole_class(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        plain().save(tmp_path / "train" / name / "0.png")
    text(tmp_path / "train/b/0.png")
    with pytest.raises(UserError, match=rf"no train image of one class can be read: {tmp_path}/train/b/0.png: cannot"):
        load(tmp_path, 1.0)
