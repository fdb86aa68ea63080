"""ImageNet as ILSVRC 2012 is laid out once unpacked."""

from pathlib import Path
from typing import Literal

from dlopt.data.folder import check_classes, data_folder, image_list, scan
from dlopt.data.images import size_pair
from dlopt.data.samples import Dataset
from dlopt.data.verify import image_files
from dlopt.errors import UserError
from dlopt.ranges import Natural, PositiveFraction

_NAMES = "LOC_synset_mapping.txt"  # "n01440764 tench, Tinca tinca", a line per class


def imagenet(
    *,
    root: str,
    class_names: str | None,
    on_error: Literal["fail", "skip"],
    max_skips: Natural | PositiveFraction,
    image_size: int | tuple[int, int] | None,
) -> Dataset:
    """Colour images under `root`/train/WNID/ and `root`/val/WNID/ (Russakovsky et al. 2015).

    The labels of ImageNet's own test set are not public, so papers report figures on its validation set. It is the
    test set here, and the validation set is cut from the training set.

    Args:
        class_names: file with a line "WNID name, other names" per class; None: `root`/LOC_synset_mapping.txt where it
            exists, otherwise the classes go by their folders' names.

    Raises:
        UserError: see `image_folder`; or a class has no name.
    """
    base = data_folder(root, "train/WNID/IMAGE and val/WNID/IMAGE")
    found = {"train": scan(base / "train")}
    if (base / "val").is_dir():
        found["test"] = scan(base / "val")
    check_classes(root, found)
    classes = _names(root, found["train"].classes, class_names)
    parts, notes = image_files(
        str(base),
        {name: image_list(listing) for name, listing in found.items()},
        image_size=size_pair(image_size),
        channels=3,
        on_error=on_error,
        max_skips=max_skips,
    )
    return Dataset(parts["train"], None, parts.get("test"), classes, notes=notes)


def _names(root: str, wnids: tuple[str, ...], file: str | None) -> tuple[str, ...]:
    """The first name of each class, with the WNID where two classes share it (there are two cranes)."""
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
    given = [names[wnid] for wnid in wnids]
    return tuple(
        name if given.count(name) == 1 else f"{name} ({wnid})" for wnid, name in zip(wnids, given, strict=True)
    )
