"""The lines on a dataset that its splits and images show, after its reader: see `dlopt.data.checks`."""

import contextlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_count
from dlopt.data.checks import LEFT_OUT, WARNING, listed, sampled
from dlopt.data.samples import Dataset, Samples, white_of
from dlopt.data.settings import SPLITS

_PICTURES = 16  # images that are looked at
_DARK, _BRIGHT = 16, 239  # of 0..255; 12 bits stored in 16 have pixels below 16


def notes(dataset: Dataset) -> tuple[str, ...]:
    """Returns the lines about a dataset: its source, the notes of its reader, and notes on its splits."""
    read = (f"read: {dataset.source}",) if dataset.source else ()
    return (*read, *dataset.notes, *_split_notes(dataset), *_image_warnings(dataset), *_losses(dataset))


def _split_notes(dataset: Dataset) -> list[str]:
    if dataset.test is None and not dataset.is_generated:
        is_text = dataset.train.kind == "text"
        found = ["no test set" if is_text else "no test set: data.test_split=0.2 sets a fifth of the samples apart"]
    else:
        found = []
    classes, train = dataset.classes, dataset.train.targets
    if classes is None or train.ndim != 1 or train.is_floating_point() or dataset.unlabelled is not None:
        return found
    counts = {name: _counts(getattr(dataset, name), len(classes)) for name in SPLITS}
    total = sum(counts.values())
    for name, label in (("val", "validation"), ("test", "test")):
        # A class with one sample is reported on its own.
        absent = [classes[i] for i in np.flatnonzero((counts[name] == 0) & (total > 1)).tolist()]
        if absent and getattr(dataset, name) is not None:
            found.append(f"{WARNING}the {label} set has no sample of {_classes(absent)}")
    return found


def _counts(samples: Samples | None, classes: int) -> np.ndarray:
    return np.zeros(classes, int) if samples is None else torch.bincount(samples.targets, minlength=classes).numpy()


def _image_warnings(dataset: Dataset) -> tuple[str, ...]:
    """Returns warnings of images that are nearly black or white, and of a held-out set of another range.

    The former are 12-bit values in 16 bits, or masks of 0 and 1. In the latter, only one set has been scaled.
    """
    images = _pictures(dataset.train)
    if images is None:
        return ()
    low, high = images.min().item(), images.max().item()
    found = []
    if images.dtype == torch.uint8 and (high < _DARK or low > _BRIGHT):
        colour = "black" if high < _DARK else "white"
        found.append(
            f"{WARNING}the images are nearly {colour}: all pixels of {len(images)} of them are from {low} to {high} "
            "(of 0 to 255); of 16 bits, the upper 8 are kept"
        )
    for name, label in (("val", "validation"), ("test", "test")):
        samples: Samples | None = getattr(dataset, name)
        if samples is None:
            continue
        with contextlib.suppress(UserError), torch.random.fork_rng(devices=()):  # raised where the image is read
            if samples.white() != white_of(images) and (others := _pictures(samples)) is not None:
                found.append(
                    f"{WARNING}the {label} images have another range than the training images: "
                    f"{others.min().item():.3g} to {others.max().item():.3g}, not {low:.3g} to {high:.3g}; scale "
                    "neither or both"
                )
    return tuple(found)


def _pictures(samples: Samples | None) -> Tensor | None:
    """Returns some of the images; None if there are none. Raises `UserError`."""
    if samples is None or len(samples.shape) != 3 or len(samples) == 0:
        return None
    chosen = torch.linspace(0, len(samples) - 1, min(_PICTURES, len(samples))).long()
    with torch.random.fork_rng(devices=()):  # transforms of the user may draw numbers, on which the run depends
        images = samples.fetch(chosen)
    return images if images.numel() else None


def _losses(dataset: Dataset) -> list[str]:
    """Returns what decoding loses, for some image files of each split."""
    losses: Counter[str] = Counter()
    total = 0
    splits = [samples for samples in (dataset.train, dataset.val, dataset.test) if samples is not None]
    for samples in splits:
        for row in sampled(len(samples)).tolist() if len(samples.shape) == 3 else ():
            with contextlib.suppress(UserError):  # raised where the image is read
                if (stored := samples.stored(row)) is None:
                    continue
                total += 1
                losses["the colour"] += samples.shape[0] == 1 and not stored.is_grey
                losses["the transparency (now white)"] += stored.has_alpha
                losses["the lower 8 of 16 bits"] += stored.has_16_bits
    found = [
        f"{LEFT_OUT}{name} of {count:,} of {format_count('images', total)} that were looked at"
        for name, count in losses.items()
        if count
    ]
    rotated = sum(samples.rotated for samples in splits)
    if rotated:
        found.append(
            f"{WARNING}the dataset returns images with an EXIF orientation, which is not applied, but is by `dlopt "
            "predict`; use PIL.ImageOps.exif_transpose"
        )
    return found


def _classes(names: Sequence[str]) -> str:
    return f"class {names[0]}" if len(names) == 1 else f"{len(names)} classes: {listed(names)}"
