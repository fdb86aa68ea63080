"""Images in class folders, also in those of the unpacked ILSVRC 2012 archives (ImageNet).

Listings of large folders are cached. A cached listing is valid while all its folders are unchanged: adding, removing
or renaming a file changes the times of its folder.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch

from dlopt.basics.errors import UserError
from dlopt.basics.files import refuse_special
from dlopt.data.cache import FileState, cache_file, file_state, load_arrays, save_arrays
from dlopt.data.images import EXTENSIONS
from dlopt.data.samples import Dataset, Files, ImageList
from dlopt.data.verify import ImageKeys, image_files

CACHE_MIN_IMAGES = 10_000  # smaller folders are scanned fast enough without a cache
# Nanoseconds. A folder that changed just before the scan may change again within the same tick of its time stamp, so
# its listing is not cached.
_SETTLED = 3 * 10**9
_VERSION = "2"
_SPLITS = ("train", "val", "test")
_SUFFIXES = tuple(EXTENSIONS)
_IMAGENET_NAMES = "LOC_synset_mapping.txt"  # "n01440764 tench, Tinca tinca", a line per class


@dataclass(frozen=True)
class Listing:
    """Images by class. `paths` are bytes relative to `folder`, grouped by class and sorted within each class."""

    folder: Path
    classes: tuple[str, ...]
    counts: np.ndarray
    paths: np.ndarray


def scan(folder: Path) -> Listing:
    """Lists the images of all class folders in `folder`, recursively.

    Skips hidden files and folders, and files that are not images. Memory: longest path x number of images.

    Raises:
        UserError: a folder cannot be read, there are no class folders, or one has no images.
    """
    folder = Path(os.path.abspath(folder))
    path = cache_file("scan", _VERSION, str(folder), *sorted(EXTENSIONS))
    if (listing := _cached(folder, path)) is not None:
        return listing
    begun = time.time_ns()
    visited: dict[bytes, FileState] = {}
    base = os.fsencode(folder)
    classes: dict[bytes, np.ndarray] = {}
    with reading("data.root"):
        for name in sorted(_list_folder(base, b"", visited, ())[1]):
            images = _images(base, name, visited)
            if not images:
                raise UserError(f"data.root: {os.fsdecode(os.path.join(base, name))} has no images")
            classes[name] = np.sort(np.array(images))
    if not classes:
        raise UserError(f"data.root: {folder} has no class folders; images are expected as CLASS/IMAGE in it")
    counts = np.array([len(images) for images in classes.values()])
    listing = Listing(folder, tuple(map(os.fsdecode, classes)), counts, np.concatenate(list(classes.values())))
    states = np.array(list(visited.values()))
    if len(listing.paths) >= CACHE_MIN_IMAGES and begun - states[:, 2:].max() > _SETTLED:
        arrays = {"folders": np.array(list(visited)), "states": states, "counts": counts, "paths": listing.paths}
        save_arrays(path, arrays | {"classes": np.array(list(classes))})
    return listing


def _cached(folder: Path, path: Path) -> Listing | None:
    """Returns the cached listing if all its folders are unchanged."""
    arrays = load_arrays(path)
    if arrays is None or set(arrays) != {"folders", "states", "counts", "paths", "classes"}:
        return None
    base = os.fsencode(folder)
    try:
        for name, state in zip(arrays["folders"], arrays["states"].tolist(), strict=True):
            if list(file_state(os.path.join(base, bytes(name)))) != state:
                return None
    except OSError:
        return None
    return Listing(folder, tuple(map(os.fsdecode, arrays["classes"])), arrays["counts"], arrays["paths"])


def images_below(folder: str) -> list[str]:
    """Returns the sorted paths of the images in `folder`, recursively; skips what `scan` skips. Raises `OSError`."""
    base = os.fsencode(folder)
    return sorted(os.fsdecode(os.path.join(base, image)) for image in _images(base, b"", {}))


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Turns an error of listing a folder that was given by `key` into a `UserError`."""
    try:
        yield
    except OSError as error:
        where = os.fsdecode(error.filename).rstrip("/")
        raise UserError(f"{key}: {where}: cannot be read ({error.strerror})") from error


def _images(base: bytes, name: bytes, visited: dict[bytes, FileState]) -> list[bytes]:
    images: list[bytes] = []
    pending: list[tuple[bytes, tuple[int, ...]]] = [(name, ())]
    while pending:
        current, ancestors = pending.pop()
        files, folders = _list_folder(base, current, visited, ancestors)
        images += files
        pending += [(folder, (*ancestors, visited[current][0])) for folder in folders]
    return images


def _list_folder(
    base: bytes, name: bytes, visited: dict[bytes, FileState], ancestors: tuple[int, ...]
) -> tuple[list[bytes], list[bytes]]:
    """Returns the (images, folders) in the folder `name`, relative to `base`.

    `ancestors`: inodes of its parent folders; links back to one of them are not followed.
    """
    images, folders = [], []
    # stat before listing: a change in between then invalidates the cached listing.
    visited[name] = file_state(os.path.join(base, name))
    if visited[name][0] in ancestors:
        return [], []
    with os.scandir(os.path.join(base, name)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                folders.append(os.path.join(name, entry.name))
            elif os.fsdecode(entry.name).lower().endswith(_SUFFIXES):
                images.append(os.path.join(name, entry.name))
    return images, folders


def image_folder(*, root: str, channels: Literal[1, 3], **keys: Unpack[ImageKeys]) -> Dataset:
    """Loads images from `root`/train/CLASS/ and, if they exist, `root`/val/CLASS/ and `root`/test/CLASS/.

    Class folders directly in `root` (`root`/CLASS/IMAGE) are a training set. Subfolders of a class folder belong to the
    class. Hidden files and folders, and files that are not images, are skipped.

    Raises:
        UserError: a folder is missing, unreadable or empty, the splits have different classes, or too many images
            cannot be read.
    """
    base = Path(root).expanduser()
    train_only = _has_class_folders(base)
    if train_only:
        listings = {"train": scan(base)}
    else:
        base = data_folder(root, "train/CLASS/IMAGE, or as CLASS/IMAGE without a test set")
        listings = {split: scan(base / split) for split in _SPLITS if (base / split).is_dir()}
    splits, notes = listed_images(root, base, listings, channels=channels, **keys)
    if train_only:
        notes = (*notes, f"data.root={root}: has no train/, val/ or test/; using all images as the training set")
    return Dataset(splits["train"], splits.get("val"), splits.get("test"), listings["train"].classes, notes=notes)


def _has_class_folders(base: Path) -> bool:
    """Returns whether `base` has two or more folders, all with images directly in them and none named like a split.

    This rejects a root one level too high (/data for /data/pets).
    """
    try:
        folders = [path for path in base.iterdir() if path.is_dir() and not path.name.startswith(".")]
        return (
            len(folders) > 1
            and not any(folder.name in _SPLITS for folder in folders)
            and all(any(file.suffix.lower() in EXTENSIONS for file in folder.iterdir()) for folder in folders)
        )
    except OSError:
        return False


def imagenet(*, root: str, class_names: str | None, **keys: Unpack[ImageKeys]) -> Dataset:
    """Loads colour images from `root`/train/WNID/ and `root`/val/WNID/ (Russakovsky et al. 2015).

    ImageNet's test labels are not public, so papers report results on its validation set. Here that is the test set,
    and the validation set is split off the training set.

    Args:
        class_names: file with a line "WNID name, other names" per class; None: `root`/LOC_synset_mapping.txt if it
            exists, else the names of the class folders.

    Raises:
        UserError: as `image_folder`, or a class has no name.
    """
    base = data_folder(root, "train/WNID/IMAGE and val/WNID/IMAGE")
    listings = {"train": scan(base / "train")}
    if (base / "val").is_dir():
        listings["test"] = scan(base / "val")
    classes = _imagenet_names(root, listings["train"].classes, class_names)
    splits, notes = listed_images(root, base, listings, channels=3, **keys)
    return Dataset(splits["train"], None, splits.get("test"), classes, notes=notes)


def _imagenet_names(root: str, wnids: tuple[str, ...], file: str | None) -> tuple[str, ...]:
    """Returns the first name of each class, with its WNID if another class shares the name (there are two cranes)."""
    path = Path(root if file is None else file).expanduser()
    if file is None:
        path /= _IMAGENET_NAMES
        if not path.is_file():
            return wnids
    try:
        refuse_special(path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.class_names={path}: cannot be read ({error})") from error
    names = {wnid: rest.split(",")[0].strip() for wnid, _, rest in (line.strip().partition(" ") for line in lines)}
    for wnid in wnids:
        if not names.get(wnid):
            raise UserError(f"data.class_names={path}: has no line {wnid!r} with a name")
    counts = Counter(names[wnid] for wnid in wnids)
    return tuple(names[wnid] if counts[names[wnid]] == 1 else f"{names[wnid]} ({wnid})" for wnid in wnids)


def data_folder(root: str, layout: str) -> Path:
    """Returns the folder `root` after checking that it has a folder train."""
    base = Path(root).expanduser()
    if not base.is_dir():
        # A saved config may be read elsewhere (`dlopt eval`): say where a relative path was looked for.
        where = "" if base.is_absolute() else f" in {Path.cwd()}"
        problem = "not a folder" if base.exists() else f"missing{where}"
        raise UserError(f"data.root={root}: is {problem}; images are expected as {layout}")
    if not (base / "train").is_dir():
        raise UserError(f"data.root={root}: {base / 'train'} is missing; images are expected as {layout}")
    return base


def listed_images(
    root: str, base: Path, listings: dict[str, Listing], *, channels: int, **keys: Unpack[ImageKeys]
) -> tuple[dict[str, Files], tuple[str, ...]]:
    """Calls `image_files` on listings. Raises `UserError` unless all splits have the classes of train."""
    classes = listings["train"].classes
    for listing in listings.values():
        extras = sorted(set(listing.classes) - set(classes))
        for missing in sorted(set(classes) - set(listing.classes)):
            other = f", and {listing.folder} has {extras[0]}, which train lacks" if extras else ""
            raise UserError(
                f"data.root={root}: the class folder {listing.folder / missing} is missing; train has it{other}"
            )
        for extra in extras:
            raise UserError(f"data.root={root}: train has no class folder like {listing.folder / extra}")
    labels = torch.arange(len(classes))
    lists = {
        split: ImageList(each.paths, labels.repeat_interleave(torch.from_numpy(each.counts)), str(each.folder))
        for split, each in listings.items()
    }
    return image_files(str(base), lists, channels=channels, **keys)
