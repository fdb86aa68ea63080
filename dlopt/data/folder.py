"""Images in class folders."""

from pathlib import Path
from typing import Literal

import torch

from dlopt.data.images import EXTENSIONS, size_pair
from dlopt.data.samples import Dataset, ImageList
from dlopt.data.scan import Listing, scan
from dlopt.data.verify import image_files
from dlopt.errors import UserError
from dlopt.ranges import Natural, PositiveShare

_PARTS = ("train", "val", "test")


def image_folder(
    *,
    root: str,
    channels: Literal[1, 3],
    on_error: Literal["fail", "skip"],
    max_skips: Natural | PositiveShare,
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
