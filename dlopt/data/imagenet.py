"""ImageNet in the folder layout of the unpacked ILSVRC 2012 archives."""

from collections import Counter
from pathlib import Path
from typing import Unpack

from dlopt.data.folder import data_folder, listed_images, scan
from dlopt.data.samples import Dataset
from dlopt.data.verify import ImageKeys
from dlopt.errors import UserError

_NAMES = "LOC_synset_mapping.txt"  # "n01440764 tench, Tinca tinca", a line per class


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
    classes = _names(root, listings["train"].classes, class_names)
    splits, notes = listed_images(root, base, listings, channels=3, **keys)
    return Dataset(splits["train"], None, splits.get("test"), classes, notes=notes)


def _names(root: str, wnids: tuple[str, ...], file: str | None) -> tuple[str, ...]:
    """Returns the first name of each class, with its WNID if another class shares the name (there are two cranes)."""
    path = Path(root if file is None else file).expanduser()
    if file is None:
        path /= _NAMES
        if not path.is_file():
            return wnids
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.class_names={path}: cannot be read ({error})") from error
    names = {wnid: rest.split(",")[0].strip() for wnid, _, rest in (line.strip().partition(" ") for line in lines)}
    for wnid in wnids:
        if not names.get(wnid):
            raise UserError(f"data.class_names={path}: has no line {wnid!r} with a name")
    counts = Counter(names[wnid] for wnid in wnids)
    return tuple(names[wnid] if counts[names[wnid]] == 1 else f"{names[wnid]} ({wnid})" for wnid in wnids)
