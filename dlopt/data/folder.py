"""Images in class folders, and which images stand in which folder.

A large scan is kept in the cache folder. It is used again only while every folder in it is unchanged: a file that is
added, removed or renamed changes the times of its folder.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dlopt.data.cache import cache_file, load_arrays, save_arrays
from dlopt.data.images import EXTENSIONS, size_pair
from dlopt.data.samples import Dataset, ImageList
from dlopt.data.verify import image_files
from dlopt.errors import UserError
from dlopt.ranges import Natural, PositiveFraction

CACHED_FROM = 10_000  # images; smaller folders are scanned faster than a cache is worth
_SETTLED = 3 * 10**9  # nanoseconds: what changed shortly before the scan may change again within one tick of its time
_VERSION = "1"
_PARTS = ("train", "val", "test")
_SUFFIXES = tuple(EXTENSIONS)


@dataclass(frozen=True)
class Listing:
    """Images by class: `paths` are bytes relative to `folder`, class after class, sorted within each."""

    folder: Path
    classes: tuple[str, ...]
    counts: np.ndarray
    paths: np.ndarray


def scan(folder: Path) -> Listing:
    """The images of the class folders in `folder`, folders within them included.

    Hidden files and folders and other files than images are passed over. Memory: the longest path times their number.

    Raises:
        UserError: a folder cannot be read, or there are no classes, or one has no images.
    """
    folder = Path(os.path.abspath(folder))
    path = cache_file("scan", _VERSION, str(folder), *sorted(EXTENSIONS))
    if (listing := _cached(folder, path)) is not None:
        return listing
    begun = time.time_ns()
    visited: dict[bytes, tuple[int, int, int]] = {}
    base = os.fsencode(folder)
    classes: dict[bytes, np.ndarray] = {}
    for name in sorted(_look(base, b"", visited, ())[1]):
        images = _images(base, name, visited)
        if not images:
            raise UserError(f"data.root: {os.fsdecode(os.path.join(base, name))} has no images")
        classes[name] = np.sort(np.array(images))
    if not classes:
        raise UserError(f"data.root: {folder} has no class folders; images are expected as CLASS/IMAGE in it")
    counts = np.array([len(images) for images in classes.values()])
    listing = Listing(folder, tuple(map(os.fsdecode, classes)), counts, np.concatenate(list(classes.values())))
    states = np.array(list(visited.values()))
    if len(listing.paths) >= CACHED_FROM and begun - states[:, 1:].max() > _SETTLED:
        arrays = {"folders": np.array(list(visited)), "states": states, "counts": counts, "paths": listing.paths}
        save_arrays(path, arrays | {"classes": np.array(list(classes))})
    return listing


def _cached(folder: Path, path: Path) -> Listing | None:
    """What an earlier scan found, where every folder is still as it was."""
    arrays = load_arrays(path)
    if arrays is None or set(arrays) != {"folders", "states", "counts", "paths", "classes"}:
        return None
    base = os.fsencode(folder)
    try:
        for name, state in zip(arrays["folders"], arrays["states"].tolist(), strict=True):
            if list(_state(os.stat(os.path.join(base, bytes(name))))) != state:
                return None
    except OSError:
        return None
    return Listing(folder, tuple(map(os.fsdecode, arrays["classes"])), arrays["counts"], arrays["paths"])


def _state(found: os.stat_result) -> tuple[int, int, int]:
    # The time of modification can be set back by copying tools, the time of change cannot.
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _images(base: bytes, name: bytes, visited: dict[bytes, tuple[int, int, int]]) -> list[bytes]:
    images: list[bytes] = []
    waiting: list[tuple[bytes, tuple[int, ...]]] = [(name, ())]
    while waiting:
        current, above = waiting.pop()
        found, folders = _look(base, current, visited, above)
        images += found
        own = (*above, visited[current][0])
        waiting += [(each, own) for each in folders]
    return images


def _look(
    base: bytes, name: bytes, visited: dict[bytes, tuple[int, int, int]], above: tuple[int, ...]
) -> tuple[list[bytes], list[bytes]]:
    """The images and the folders in the folder `name`, relative to `base`.

    `above`: the inodes of the folders that lead here; a link back to one of them is not followed.
    """
    images, folders = [], []
    try:
        visited[name] = _state(os.stat(os.path.join(base, name)))  # before its entries: a change between is noticed
        if visited[name][0] in above:
            return [], []
        with os.scandir(os.path.join(base, name)) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    folders.append(os.path.join(name, entry.name))
                elif os.fsdecode(entry.name).lower().endswith(_SUFFIXES):
                    images.append(os.path.join(name, entry.name))
    except OSError as error:
        where = os.fsdecode(os.path.join(base, name)).rstrip("/")
        raise UserError(f"data.root: {where}: cannot be read ({error.strerror})") from error
    return images, folders


def image_folder(
    *,
    root: str,
    channels: Literal[1, 3],
    on_error: Literal["fail", "skip"],
    max_skips: Natural | PositiveFraction,
    image_size: int | tuple[int, int] | None,
) -> Dataset:
    """Images under `root`/train/CLASS/, and where they exist `root`/val/CLASS/ and `root`/test/CLASS/.

    A folder of class folders alone, `root`/CLASS/IMAGE, is a training set.

    Folders within a class folder belong to the class; hidden files and folders and other files than images are passed
    over.

    Raises:
        UserError: a folder is missing, unreadable or empty, the parts have different classes, or too many images
            cannot be read.
    """
    base = Path(root).expanduser()
    whole = _holds_classes(base)
    if whole:
        found = {"train": scan(base)}
    else:
        base = data_folder(root, "train/CLASS/IMAGE, or as CLASS/IMAGE without a test set")
        found = {name: scan(base / name) for name in _PARTS if (base / name).is_dir()}
    check_classes(root, found)
    parts, notes = image_files(
        str(base),
        {name: image_list(listing) for name, listing in found.items()},
        image_size=size_pair(image_size),
        channels=channels,
        on_error=on_error,
        max_skips=max_skips,
    )
    if whole:
        notes = (*notes, f"data.root={root}: no train/, val/ or test/ in it, so all of it is the training set")
    return Dataset(parts["train"], parts.get("val"), parts.get("test"), found["train"].classes, notes=notes)


def _holds_classes(base: Path) -> bool:
    """Whether at least two folders stand there, none of them a part of a data set, and each holds images itself.

    A folder one level too high, /data for /data/pets, is none.
    """
    try:
        folders = [each for each in base.iterdir() if each.is_dir() and not each.name.startswith(".")]
        return (
            len(folders) > 1
            and not any(each.name in _PARTS for each in folders)
            and all(any(file.suffix.lower() in EXTENSIONS for file in each.iterdir()) for each in folders)
        )
    except OSError:
        return False


def data_folder(root: str, layout: str) -> Path:
    """The folder `root`, which has to hold a folder train."""
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"data.root={root}: is {'not a folder' if base.exists() else 'missing'}")
    if not (base / "train").is_dir():
        raise UserError(f"data.root={root}: {base / 'train'} is missing; images are expected as {layout}")
    return base


def check_classes(root: str, found: dict[str, Listing]) -> None:
    """Refuses parts with other classes than train's."""
    classes = found["train"].classes
    for listing in found.values():
        for missing in sorted(set(classes) - set(listing.classes)):
            raise UserError(f"data.root={root}: the class folder {listing.folder / missing} is missing; train has it")
        for extra in sorted(set(listing.classes) - set(classes)):
            raise UserError(f"data.root={root}: train has no class folder like {listing.folder / extra}")


def image_list(listing: Listing) -> ImageList:
    targets = torch.arange(len(listing.classes)).repeat_interleave(torch.from_numpy(listing.counts))
    return ImageList(listing.paths, targets, str(listing.folder))
