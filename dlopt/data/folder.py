"""Images in class folders."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from dlopt.data.images import is_image, size_pair
from dlopt.data.samples import Dataset, Files
from dlopt.errors import UserError


def image_folder(*, root: str, channels: Literal[1, 3], image_size: int | tuple[int, int] | None) -> Dataset:
    """Images under `root`/train/CLASS/, and where they exist `root`/val/CLASS/ and `root`/test/CLASS/.

    Folders within a class folder belong to the class; hidden files and other files than images are passed over.

    Raises:
        UserError: a folder is missing, unreadable or empty, or the parts have different classes.
    """
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"data.root={root}: is {'not a folder' if base.exists() else 'missing'}")
    if not (base / "train").is_dir():
        raise UserError(f"data.root={root}: {base / 'train'} is missing; images are expected as train/CLASS/IMAGE")
    found = {name: _classes(base / name) for name in ("train", "val", "test") if (base / name).is_dir()}
    classes = tuple(found["train"])
    for name, theirs in found.items():
        for missing in set(classes) - set(theirs):
            raise UserError(f"data.root={root}: the class folder {base / name / missing} is missing; train has it")
        for extra in set(theirs) - set(classes):
            raise UserError(f"data.root={root}: train has no class folder like {base / name / extra}")
    parts = {name: _files(theirs, size_pair(image_size), channels) for name, theirs in found.items()}
    return Dataset(parts["train"], parts.get("val"), parts.get("test"), classes)


def _classes(folder: Path) -> dict[str, list[str]]:
    """The images of each class, in a fixed order."""
    result = {}
    for name in sorted(_entries(folder)):
        if not name.startswith(".") and (folder / name).is_dir():
            result[name] = sorted(_images(folder / name))
            if not result[name]:
                raise UserError(f"data=image_folder: {folder / name} has no images")
    if not result:
        raise UserError(f"data=image_folder: {folder} has no class folders; images are expected as CLASS/IMAGE in it")
    return result


def _images(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error)

    for current, _, names in os.walk(folder, onerror=fail, followlinks=True):
        yield from (os.path.join(current, name) for name in names if is_image(Path(name)))


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(f"data=image_folder: {folder}: cannot be read ({error.strerror})")


def _files(classes: dict[str, list[str]], size: tuple[int, int] | None, channels: int) -> Files:
    paths = [path for images in classes.values() for path in images]
    counts = torch.tensor([len(images) for images in classes.values()])
    return Files(paths, torch.arange(len(classes)).repeat_interleave(counts), size, channels)
