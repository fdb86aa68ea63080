"""Images in class folders, including the unpacked ILSVRC 2012 archives (ImageNet).

Listings of large folders are cached. A cached listing is valid while all its folders are unchanged: adding, removing
or renaming a file changes the times of its folder.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch

from dlopt.basics.cache import FileState, cache_file, file_state, load_arrays, save_arrays
from dlopt.basics.errors import UserError
from dlopt.basics.files import refuse_special
from dlopt.data.checks import IMAGE_EXTENSIONS, LEFT_OUT, ending, label_warnings, left_out_note, natural
from dlopt.data.images.files import ImageList
from dlopt.data.images.unreadable import ImageKeys, image_files
from dlopt.data.samples import Dataset
from dlopt.data.settings import SPLITS

CACHE_MIN_IMAGES = 10_000  # smaller folders are scanned fast enough without a cache
# Nanoseconds. A folder that changed just before the scan may change again within the same tick of its time stamp, so
# its listing is not cached.
_SETTLED = 3 * 10**9
_VERSION = "4"
_CACHED = {"folders", "states", "counts", "paths", "classes", "left_out"}
_SUFFIXES = tuple(IMAGE_EXTENSIONS)
_SHOWN_CLASSES = 5
_IMAGENET_NAMES = "LOC_synset_mapping.txt"  # "n01440764 tench, Tinca tinca", a line per class


@dataclass(frozen=True)
class Listing:
    """Images by class. `paths` are bytes relative to `folder`, grouped by class and sorted within each class.

    `left_out`: how many files are not images, by ending or reason.
    """

    folder: Path
    classes: tuple[str, ...]
    counts: np.ndarray
    paths: np.ndarray
    left_out: Mapping[str, int] = field(default_factory=dict)


def scan(folder: Path) -> Listing:
    """Lists the images of all class folders in `folder`, recursively.

    Skips hidden files and folders, and files that are not images. Memory: longest path x number of images.

    Raises:
        UserError: a folder cannot be read, or there are no class folders.
    """
    folder = Path(os.path.abspath(folder))
    path = cache_file("scan", _VERSION, str(folder), *sorted(IMAGE_EXTENSIONS))
    if (listing := _cached(folder, path)) is not None:
        return listing
    begun = time.time_ns()
    visited: dict[bytes, FileState] = {}
    base = os.fsencode(folder)
    classes: dict[bytes, np.ndarray] = {}
    left_out: Counter[str] = Counter()
    with reading("data.root"):
        outside, names = _list_folder(base, b"", visited, (), left_out)
        for name in sorted(names):
            classes[name] = np.sort(np.array(_images(base, name, visited, left_out), dtype=np.bytes_))
    left_out += Counter()  # without zeros
    if outside:
        left_out["outside of the class folders"] = len(outside)
    if not classes:
        raise UserError(f"data.root: {folder} has no class folders; images are expected as CLASS/IMAGE in it")
    counts = np.array([len(images) for images in classes.values()])
    paths = np.concatenate(list(classes.values()))
    listing = Listing(folder, tuple(map(os.fsdecode, classes)), counts, paths, dict(left_out))
    states = np.array(list(visited.values()))
    if len(listing.paths) >= CACHE_MIN_IMAGES and begun - states[:, 2:].max() > _SETTLED:
        arrays = {"folders": np.array(list(visited)), "states": states, "counts": counts, "paths": listing.paths}
        save_arrays(path, arrays | {"classes": np.array(list(classes)), "left_out": np.array(json.dumps(left_out))})
    return listing


def _cached(folder: Path, path: Path) -> Listing | None:
    """Returns the cached listing if all its folders are unchanged."""
    arrays = load_arrays(path)
    if arrays is None or set(arrays) != _CACHED:
        return None
    base = os.fsencode(folder)
    try:
        for name, state in zip(arrays["folders"], arrays["states"].tolist(), strict=True):
            if list(file_state(os.path.join(base, bytes(name)))) != state:
                return None
    except OSError:
        return None
    classes, left_out = tuple(map(os.fsdecode, arrays["classes"])), json.loads(arrays["left_out"].item())
    return Listing(folder, classes, arrays["counts"], arrays["paths"], left_out)


def images_below(folder: str) -> tuple[list[str], dict[str, int]]:
    """Returns the sorted paths of the images in `folder`, recursively, and the other files by ending or reason.

    Skips what `scan` skips. Raises `OSError`.
    """
    base, left_out = os.fsencode(folder), Counter[str]()
    images = _images(base, b"", {}, left_out)
    return sorted(os.fsdecode(os.path.join(base, image)) for image in images), dict(+left_out)


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Turns an error of listing a folder that was given by `key` into a `UserError`."""
    try:
        yield
    except OSError as error:
        where = os.fsdecode(error.filename).rstrip("/")
        raise UserError(f"{key}: {where}: cannot be read ({error.strerror})") from error


def _images(base: bytes, name: bytes, visited: dict[bytes, FileState], left_out: Counter[str]) -> list[bytes]:
    images: list[bytes] = []
    above = (visited[b""][0],) if name and b"" in visited else ()
    pending: list[tuple[bytes, tuple[int, ...]]] = [(name, above)]
    while pending:
        current, ancestors = pending.pop()
        files, folders = _list_folder(base, current, visited, ancestors, left_out)
        images += files
        pending += [(folder, (*ancestors, visited[current][0])) for folder in folders]
    return images


def _list_folder(
    base: bytes, name: bytes, visited: dict[bytes, FileState], ancestors: tuple[int, ...], left_out: Counter[str]
) -> tuple[list[bytes], list[bytes]]:
    """Returns the (images, folders) in the folder `name`, relative to `base`; counts the other files in `left_out`.

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
                left_out["hidden"] += not entry.is_dir()
            elif entry.is_dir():
                folders.append(os.path.join(name, entry.name))
            elif os.fsdecode(entry.name).lower().endswith(_SUFFIXES):
                images.append(os.path.join(name, entry.name))
            else:
                left_out[ending(os.fsdecode(entry.name))] += 1
    return images, folders


def image_folder(*, root: str, channels: Literal[1, 3], **keys: Unpack[ImageKeys]) -> Dataset:
    """Loads images from `root`/train/CLASS/ and, if they exist, `root`/val/CLASS/ and `root`/test/CLASS/.

    Class folders directly in `root` (`root`/CLASS/IMAGE) are a training set. Subfolders of a class folder belong to the
    class. Hidden files and folders, and files that are not images, are skipped.

    Raises:
        UserError: a folder is missing, unreadable or empty, the splits have different classes, or too many images
            cannot be read.
    """
    base = Path(os.path.expanduser(root))
    found = _class_folders(base)
    train_only = len(found) > 1
    if len(found) == 1 and found[0] not in SPLITS:
        raise UserError(
            f"data.root={root}: has one class folder, {found[0]}; images are expected as CLASS/IMAGE of two classes or "
            "more, or as train/CLASS/IMAGE"
        )
    if train_only:
        listings = {"train": scan(base)}
    else:
        base = data_folder(root, "train/CLASS/IMAGE, or as CLASS/IMAGE without a test set")
        listings = {split: scan(base / split) for split in SPLITS if (base / split).is_dir()}
    classes = listings["train"].classes
    dataset = listed_images(root, base, listings, classes, channels=channels, **keys)
    if train_only:
        dataset.notes += (f"data.root={root}: has no train/, val/ or test/; its images are one set, which is split",)
    else:
        with reading("data.root"):
            folders = [each.name for each in os.scandir(base) if each.is_dir() and not each.name.startswith(".")]
        dataset.notes += tuple(
            f"{LEFT_OUT}folder {name} (train, val and test are read)" for name in sorted({*folders} - {*SPLITS})
        )
    if classes != tuple(sorted(classes, key=natural)):
        shown = ", ".join(classes[:_SHOWN_CLASSES]) + ", ..." * (len(classes) > _SHOWN_CLASSES)
        dataset.notes += (f"the class folders are in the order of their names, not of their numbers: {shown}",)
    return dataset


def _class_folders(base: Path) -> list[str]:
    """Returns the folders in `base` if all have images directly in them and none of several is named like a split.

    This rejects a root one level too high (/data for /data/pets).
    """
    try:
        folders = [path for path in base.iterdir() if path.is_dir() and not path.name.startswith(".")]
        have_images = all(
            any(file.suffix.lower() in IMAGE_EXTENSIONS for file in folder.iterdir()) for folder in folders
        )
    except OSError:
        return []
    names = [folder.name for folder in folders]
    return names if have_images and (len(names) == 1 or not {*names} & {*SPLITS}) else []


def imagenet(*, root: str, class_names: str | None, **keys: Unpack[ImageKeys]) -> Dataset:
    """Loads colour images from `root`/train/WNID/ and `root`/val/WNID/ (Russakovsky et al. 2015).

    ImageNet's test labels are not public, so papers report results on its validation set. Here that is the test set,
    and the validation set is split off the training set. The keys: see `conf/data/imagenet.yaml`.

    Raises:
        UserError: as `image_folder`, or a class has no name.
    """
    base = data_folder(root, "train/WNID/IMAGE and val/WNID/IMAGE")
    listings = {"train": scan(base / "train")}
    if (base / "val").is_dir():
        listings["test"] = scan(base / "val")
    classes = _imagenet_names(root, listings["train"].classes, class_names)
    return listed_images(root, base, listings, classes, channels=3, **keys)


def _imagenet_names(root: str, wnids: tuple[str, ...], file: str | None) -> tuple[str, ...]:
    """Returns the first name of each class, with its WNID if another class shares the name (there are two cranes)."""
    path = Path(os.path.expanduser(root if file is None else file))
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
    base = Path(os.path.expanduser(root))
    if not base.is_dir():
        # A saved config may be read elsewhere (`dlopt eval`), so the message shows how a relative path was resolved.
        where = "" if base.is_absolute() else f" in {Path.cwd()}"
        problem = "not a folder" if base.exists() else f"missing{where}"
        raise UserError(f"data.root={root}: is {problem}; images are expected as {layout}")
    if not (base / "train").is_dir():
        raise UserError(f"data.root={root}: {base / 'train'} is missing; images are expected as {layout}")
    return base


def listed_images(
    root: str,
    base: Path,
    listings: dict[str, Listing],
    names: tuple[str, ...],
    *,
    channels: int,
    **keys: Unpack[ImageKeys],
) -> Dataset:
    """Calls `image_files` on listings; `names`: of the classes.

    The validation and the test set may lack classes. Raises `UserError` if they have others, if a split has no images,
    or a class no training images.
    """
    classes = listings["train"].classes
    for split, listing in listings.items():
        filled = {name for name, count in zip(listing.classes, listing.counts.tolist(), strict=True) if count}
        if split == "train" and len(filled) < len(classes):
            others = "".join(f" ({note})" for note in left_out_note(listing.left_out))
            raise UserError(f"data.root: {listing.folder / min({*classes} - filled)} has no images{others}")
        if not filled:
            raise UserError(f"data.root: {listing.folder} has no images")
        for extra in sorted(filled - {*classes}):
            lacking = sorted({*classes} - filled)
            hint = f", and {lacking[0]} is missing there" if lacking else ""
            raise UserError(f"data.root={root}: train has no class folder like {listing.folder / extra}{hint}")
    numbers = {name: number for number, name in enumerate(classes)}
    lists = {
        split: ImageList(
            each.paths,
            # A class that train lacks has no images: its number does not matter.
            torch.tensor([numbers.get(name, 0) for name in each.classes]).repeat_interleave(
                torch.from_numpy(each.counts)
            ),
            str(each.folder),
        )
        for split, each in listings.items()
    }
    files, notes = image_files(str(base), lists, channels, keys)
    unread: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for each in listings.values():
        unread.update(each.left_out)
        counts.update(dict(zip(each.classes, each.counts.tolist(), strict=True)))
    warnings = label_warnings("data.root", counts, may_be_values=False)
    return Dataset(
        files["train"],
        files.get("val"),
        files.get("test"),
        names,
        notes=(*left_out_note(unread), *notes, *warnings),
        source=f"{counts.total():,} images in {len(classes):,} class folders",
    )
