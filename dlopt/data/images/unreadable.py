"""Skips unreadable images (`data.on_error=skip`).

Every image is decoded once before any split or training. The results are cached and stay valid while a file keeps its
size and times, so all processes of a run, and a resumed run, skip the same images. An image that becomes unreadable
during the run fails it.
"""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.cache import FileState, cache_file, exclusive, file_state, load_arrays, save, save_arrays
from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Natural, PositiveFraction
from dlopt.data.images.decoding import decode, size_pair
from dlopt.data.images.files import Files, ImageList
from dlopt.data.loading import Loader, worker_count

log = logging.getLogger(__name__)

_MAX_LISTED = 20  # images named on the console
_BATCH = 32  # images decoded between two checks of the cap
_PROGRESS = 10.0  # seconds between progress messages
_VERSION = "2"


class ImageKeys(TypedDict):
    """Config keys of every dataset of image files: see `conf/data/image_folder.yaml`."""

    on_error: Literal["fail", "skip"]
    max_skips: Natural | PositiveFraction
    image_size: int | tuple[int, int] | None


def image_files(
    key: str, splits: Mapping[str, ImageList], channels: int, keys: ImageKeys
) -> tuple[dict[str, Files], tuple[str, ...]]:
    """Returns the images of each split as samples, and lines for the user about skipped images.

    `key`: folder or file of the data, which identifies it in the cache.

    Raises:
        UserError: more than `max_skips` images, or all images of a class, cannot be read.
    """
    key, image_size, max_skips = os.path.abspath(key), size_pair(keys["image_size"]), keys["max_skips"]
    total = sum(map(len, splits.values()))
    cap = max_skips if isinstance(max_skips, int) else max(1, int(max_skips * total))
    readable = dict(splits)
    bad: list[str] = []
    for split, images in splits.items() if keys["on_error"] == "skip" else ():
        good = _readable(f"{key}\0{split}", _Checks(images, image_size, channels), cap - len(bad))
        bad += [images.path(index) for index in (~good).nonzero()[0].tolist()]
        if len(bad) > cap:
            raise UserError(
                f"data.max_skips={max_skips}: more than {cap} of {total} images cannot be read; "
                f"set a larger data.max_skips, or check the files: {'; '.join(map(_reason, bad[:3]))}"
            )
        readable[split] = images.select(torch.from_numpy(good.nonzero()[0]))
        lost = set(images.targets.unique().tolist()) - set(readable[split].targets.unique().tolist())
        if lost and not images.targets.is_floating_point():
            example = images.path(int((images.targets == min(lost)).nonzero()[0, 0]))
            raise UserError(f"data.on_error=skip: no {split} image of one class can be read: {_reason(example)}; ...")
    files = {split: Files(images, image_size, channels) for split, images in readable.items()}
    return files, tuple(_notes(key, bad, total))


def _reason(path: str) -> str:
    """Returns `path` and why it cannot be read."""
    try:
        decode(path, None, 3)
    except UserError as error:
        return str(error)
    return f"{path}: could not be read when it was checked"


def _readable(key: str, checks: "_Checks", cap: int) -> np.ndarray:
    """Returns bool [N]: which images can be read. Stops once more than `cap` cannot."""
    from PIL import __version__ as pillow

    path, images = cache_file("readable", _VERSION, pillow, key), checks.images
    with exclusive(path):  # the first process checks the images; the others then read its cache
        states = np.array([_state(images.path(index)) for index in range(len(images))]).reshape(-1, 4)
        good, unknown = _cached(path, images, states)
        done, last_message = 0, time.monotonic()
        with closing(Loader(checks, worker_count("auto", unknown))) as loader:
            for result in loader.run(torch.from_numpy(unknown).split(_BATCH)):
                good[unknown[done : done + len(result)]] = result.numpy()
                done += len(result)
                if int((~good).sum()) > cap:
                    return good
                if time.monotonic() - last_message > _PROGRESS:
                    last_message = time.monotonic()
                    # a warning, so that it goes to stderr
                    log.warning(f"data.on_error=skip: checked {done:,} of {len(unknown):,} images")
        if len(unknown):
            save_arrays(path, {"paths": images.paths, "states": states, "good": good})
    return good


@dataclass(frozen=True)
class _Checks:
    """A `Reader` of bools: whether an image can be read. This lets a `Loader` check images in workers."""

    images: ImageList
    image_size: tuple[int, int] | None
    channels: int

    def fetch(self, indices: Tensor) -> Tensor:
        readable = torch.zeros(len(indices), dtype=torch.bool)
        for number, index in enumerate(indices.tolist()):
            with suppress(UserError):
                decode(self.images.path(index), self.image_size, self.channels)
                readable[number] = True
        return readable


def _state(path: str) -> FileState:
    try:
        return file_state(path)
    except OSError:
        return 0, 0, 0, 0


def _cached(path: Path, images: ImageList, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cached results (True for unknown images), and the indices of the images to check."""
    good = np.ones(len(images), dtype=np.bool_)
    known = np.zeros(len(images), dtype=np.bool_)
    arrays = load_arrays(path)
    if arrays is not None and {"paths", "states", "good"} == set(arrays):
        _, rows, cached_rows = np.intersect1d(images.paths, arrays["paths"], return_indices=True)
        same = (states[rows] == arrays["states"][cached_rows]).all(1) & (states[rows, 1] > 0)
        good[rows[same]], known[rows[same]] = arrays["good"][cached_rows[same]], True
    return good, (~known).nonzero()[0]


def _notes(key: str, bad: list[str], total: int) -> list[str]:
    if not bad:
        return []
    lines = [f"data.on_error=skip: skipped {len(bad)} of {total} images, which cannot be read:"]
    lines += [f"  {_reason(path)}" for path in bad[:_MAX_LISTED]]
    if len(bad) > _MAX_LISTED:
        file = cache_file("skipped", key).with_suffix(".txt")
        text = "".join(f"{path}\n" for path in bad).encode("utf-8", "surrogateescape")
        if save(file, text):
            lines.append(f"  and {len(bad) - _MAX_LISTED} more: {file}")
        else:
            lines += [f"  {path}" for path in bad[_MAX_LISTED:]]
    return lines
