"""Leaving out images that cannot be read (`data.on_error=skip`).

Which images these are is settled before anything is split or trained: every image is decoded once, the results are
kept in the cache folder and hold for as long as a file keeps its size and its times. So all processes of a run, and
the run that goes on with it, leave out the same images. An image that breaks later, during the run, fails it.
"""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dlopt.data.cache import alone, cache_file, load_arrays, save, save_arrays
from dlopt.data.images import decode
from dlopt.data.loading import Loader, worker_count
from dlopt.data.samples import Files, ImageList
from dlopt.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 20  # images named on the console
_WORTH_WORKERS = 1000  # images; below, starting processes takes longer than looking
_PIECE = 32  # images decoded between two looks at the cap
_PROGRESS = 10.0  # seconds between lines about a long look
_VERSION = "1"


def image_files(
    key: str,
    parts: Mapping[str, ImageList],
    *,
    image_size: tuple[int, int] | None,
    channels: int,
    on_error: Literal["fail", "skip"],
    max_skips: int | float,
) -> tuple[dict[str, Files], tuple[str, ...]]:
    """The images as samples, and lines for the user about those that are left out.

    Args:
        key: what names the data in the cache: their folder or file.
        on_error: what happens to images that cannot be read. `fail`: nothing before they are read.
        max_skips: how many images may be left out: a count, or as a float a share of all.

    Raises:
        UserError: more images than that cannot be read, or all images of a class.
    """
    notes: list[str] = []
    if on_error == "skip":
        parts, notes = _readable_parts(os.path.abspath(key), parts, image_size, channels, max_skips)
    files = {name: Files(part.paths, part.targets, image_size, channels, part.folder) for name, part in parts.items()}
    return files, tuple(notes)


def _readable_parts(
    key: str,
    parts: Mapping[str, ImageList],
    image_size: tuple[int, int] | None,
    channels: int,
    max_skips: int | float,
) -> tuple[dict[str, ImageList], list[str]]:
    total = sum(len(part) for part in parts.values())
    cap = max_skips if isinstance(max_skips, int) else int(max_skips * total)
    left: dict[str, ImageList] = {}
    bad: list[str] = []
    for name, part in parts.items():
        good = _readable(f"{key}\0{name}", part, _Checks(part, image_size, channels), cap - len(bad))
        bad += [part.path(index) for index in (~good).nonzero()[0].tolist()]
        if len(bad) > cap:
            raise UserError(
                f"data.max_skips={max_skips}: more than {cap} of {total} images cannot be read; "
                f"allow more, or look at the files: {'; '.join(map(_reason, bad[:3]))}"
            )
        left[name] = part.select(torch.from_numpy(good.nonzero()[0]))
        lost = set(part.targets.unique().tolist()) - set(left[name].targets.unique().tolist())
        if lost and not part.targets.is_floating_point():
            example = part.path(int((part.targets == min(lost)).nonzero()[0, 0]))
            raise UserError(f"data.on_error=skip: no {name} image of one class can be read: {_reason(example)}; ...")
    return left, _tell(key, bad, total)


def _reason(path: str) -> str:
    """`path` and why it cannot be read."""
    try:
        decode(path, None, 3)
    except UserError as error:
        return str(error)
    return f"{path}: could not be read when it was looked at"


def _readable(key: str, images: ImageList, checks: "_Checks", cap: int) -> np.ndarray:
    """bool [N]: which of the images can be read. Stops looking when more than `cap` cannot."""
    from PIL import __version__ as pillow

    path = cache_file("readable", _VERSION, pillow, key)
    with alone(path):
        states = np.array([_state(images.path(index)) for index in range(len(images))]).reshape(-1, 4)
        good, unknown = _known(path, images, states)
        loader = Loader(checks, worker_count("auto", checks) if len(unknown) >= _WORTH_WORKERS else 0)
        done, told = 0, time.monotonic()
        try:
            for result in loader.run(torch.from_numpy(unknown).split(_PIECE)):
                good[unknown[done : done + len(result)]] = result.numpy()
                done += len(result)
                if int((~good).sum()) > cap:
                    return good
                if time.monotonic() - told > _PROGRESS:
                    told = time.monotonic()
                    log.warning(f"data.on_error=skip: {done:,} of {len(unknown):,} images looked at")  # on stderr
        finally:
            loader.close()
        if len(unknown):
            save_arrays(path, {"paths": images.paths, "states": states, "good": good})
    return good


class _Checks:
    """Whether each of the images can be read, in the form of samples, so that workers can look."""

    def __init__(self, images: ImageList, image_size: tuple[int, int] | None, channels: int) -> None:
        self.targets = images.targets
        self.shape: tuple[int, ...] = ()
        self._images = images
        self._image_size = image_size
        self._channels = channels

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, indices: Tensor) -> Tensor:
        return torch.tensor([self._can_read(self._images.path(index)) for index in indices.tolist()])

    def select(self, indices: Tensor) -> "_Checks":
        return _Checks(self._images.select(indices), self._image_size, self._channels)

    def _can_read(self, path: str) -> bool:
        try:
            decode(path, self._image_size, self._channels)
        except UserError:
            return False
        return True


def _state(path: str) -> tuple[int, int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0, 0, 0
    return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _known(path: Path, images: ImageList, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is known of each image (True where nothing is), and the indices of those that have to be looked at."""
    good = np.ones(len(images), dtype=np.bool_)
    known = np.zeros(len(images), dtype=np.bool_)
    arrays = load_arrays(path)
    if arrays is not None and {"paths", "states", "good"} == set(arrays):
        _, here, there = np.intersect1d(images.paths, arrays["paths"], return_indices=True)
        same = (states[here] == arrays["states"][there]).all(1) & (states[here, 0] > 0)
        here, there = here[same], there[same]
        good[here], known[here] = arrays["good"][there], True
    return good, (~known).nonzero()[0]


def _tell(key: str, bad: list[str], total: int) -> list[str]:
    if not bad:
        return []
    lines = [f"data.on_error=skip: {len(bad)} of {total} images are left out, they cannot be read:"]
    lines += [f"  {_reason(path)}" for path in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        listed = cache_file("skipped", key).with_suffix(".txt")
        text = "".join(f"{path}\n" for path in bad).encode("utf-8", "surrogateescape")
        if save(listed, text):
            lines.append(f"  and {len(bad) - _SHOWN} more: {listed}")
        else:
            lines += [f"  {path}" for path in bad[_SHOWN:]]
    return lines
