"""Fitting an input normalization without reading a large streamed set whole before the first batch."""

import hashlib
import os

import torch
from torch import nn

from dlopt.data.cache import alone, cache_file, load_arrays, save_arrays
from dlopt.data.samples import Dataset, Files, Samples

_VERSION = "1"
_WORTH_CACHE = 1000  # samples; fewer are soon read again


def fit(normalize: nn.Module, dataset: Dataset, *, count: int | None, kind: str) -> None:
    """Fits `normalize` to the training samples, or to `count` of them, evenly spread, where they are not in memory.

    What came of many image files is kept in the cache folder and holds as long as these files stay as they are.

    Args:
        kind: names the normalization and its settings in the cache.
    """
    samples = dataset.train
    if not dataset.in_memory and count is not None and len(samples) > count:
        samples = samples.select(torch.linspace(0, len(samples) - 1, count, dtype=torch.float64).round().long())
    if dataset.in_memory or not isinstance(samples, Files) or len(samples) < _WORTH_CACHE:
        _fit(normalize, samples)
        return
    path = cache_file("statistics", _VERSION, kind, _digest(samples))
    with alone(path):
        state, known = normalize.state_dict(), load_arrays(path)
        if known is not None and {name: value.shape for name, value in known.items()} == {
            name: tuple(value.shape) for name, value in state.items()
        }:
            normalize.load_state_dict({name: torch.from_numpy(value) for name, value in known.items()})
            return
        _fit(normalize, samples)
        save_arrays(path, {name: value.cpu().numpy() for name, value in normalize.state_dict().items()})


def _fit(normalize: nn.Module, samples: Samples) -> None:
    normalize.fit(samples)  # type: ignore[operator]


def _digest(files: Files) -> str:
    """Of the paths, sizes and times of the files, and of what they are decoded to."""
    digest = hashlib.sha256(repr((files.image_size, files.channels)).encode())
    for index in range(len(files)):
        path = files.path(index)
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
        except OSError:
            state = "-"  # reading it will say what is wrong
        digest.update(os.fsencode(os.path.abspath(path)) + b"\0" + state.encode() + b"\0")
    return digest.hexdigest()
