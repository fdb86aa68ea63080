"""Input normalization: modules that turn uint8 or float batches into what the model sees.

Their statistics come from the training split and live in buffers, hence in checkpoints. The buffers' dtype is the
dtype of the result.
"""

import hashlib
import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dlopt.data.cache import alone, cache_file, load_arrays, save_arrays
from dlopt.data.loading import chunks
from dlopt.data.samples import Dataset, Files, Samples
from dlopt.errors import UserError
from dlopt.ranges import Positive


class ScaleShift(nn.Module):
    """x * scale + shift with one pair per channel of images (C, H, W), or per feature of vectors (F,)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, *, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        shape = (input_shape[0],) + (1,) * (len(input_shape) - 1)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("shift", torch.zeros(shape))

    def fit(self, samples: Samples) -> None:
        """Computes the statistics from the training samples; here there are none."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.mul(inputs, self.scale).add_(self.shift)

    def _set(self, scale: Tensor, shift: Tensor) -> None:
        self.scale.copy_(scale.view_as(self.scale))
        self.shift.copy_(shift.view_as(self.shift))


class Nothing(ScaleShift):
    """Conversion to floating point; images stay 0..255."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.scale.dtype)


class Unit(ScaleShift):
    """To 0..1: images from 0..255, features from the smallest and largest training value (constant ones to 0)."""

    def fit(self, samples: Samples) -> None:
        if len(samples.shape) == 3 and samples.fetch(torch.tensor([0])).dtype == torch.uint8:
            self._set(torch.full_like(self.scale, 1 / 255), torch.zeros_like(self.shift))
            return
        low, high = _extremes(samples)
        width = torch.where(high > low, high - low, 1.0)
        self._set(1 / width, -low / width)


class Standardize(ScaleShift):
    """To mean 0 and standard deviation 1 over the training samples; a constant channel or feature becomes 0."""

    def fit(self, samples: Samples) -> None:
        mean, deviation = moments(samples)
        self._set(1 / deviation, -mean / deviation)


class MeanPixel(ScaleShift):
    """`scale` times x minus one value per channel, or per feature (images: 0..255).

    `values`: fixed, in the units of the data (images: 0..255); None: the mean of the training samples.
    """

    def __init__(self, *, values: tuple[float, ...] | None, scale: Positive, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape=input_shape)
        if values is not None and len(values) != input_shape[0]:
            raise UserError(
                f"normalize.values={list(values)}: has {len(values)} values; the data have {input_shape[0]} "
                f"{'channels' if len(input_shape) == 3 else 'features'}"
            )
        self._fixed = values
        self._factor = scale
        if values is not None:
            self._set_mean(torch.tensor(values))

    def fit(self, samples: Samples) -> None:
        if self._fixed is None:
            self._set_mean(moments(samples)[0])

    def _set_mean(self, mean: Tensor) -> None:
        self._set(torch.full_like(self.scale, self._factor), -self._factor * mean)


class MeanImage(nn.Module):
    """`scale` times x minus the mean training image (Krizhevsky et al. 2012), a value for each pixel (0..255)."""

    mean: Tensor

    def __init__(self, *, scale: Positive, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self._factor = scale
        self.register_buffer("mean", torch.zeros(input_shape))

    def fit(self, samples: Samples) -> None:
        """Computes the mean of the training samples."""
        total = torch.zeros(samples.shape, dtype=torch.float64)
        for chunk in chunks(samples):
            total += chunk.sum(0, dtype=torch.float64)
        self.mean.copy_(total / len(samples))

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.shape[1:] != self.mean.shape:
            raise UserError(
                f"normalize=mean_image: the mean image is {list(self.mean.shape)}, the batch's images are "
                f"{list(inputs.shape[1:])}; use an augmentation that keeps the size, or normalize=mean_pixel"
            )
        return torch.sub(inputs, self.mean).mul_(self._factor)


def moments(samples: Samples) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel or feature, float64; the deviation of a constant one is given as 1."""
    count, mean, squares = 0, torch.zeros(samples.shape[0], dtype=torch.float64), torch.tensor(0.0).double()
    for rows in _rows(samples):
        # The chunks' sums of squared deviations are merged as in Chan, Golub & LeVeque 1983: no cancellation.
        here = rows.mean(0)
        within = rows.sub_(here).square_().sum(0)
        delta, total = here - mean, count + len(rows)
        squares = squares + within + delta.square() * (count * len(rows) / total)
        mean = mean + delta * (len(rows) / total)
        count = total
    deviation = (squares / count).sqrt()
    # What rounding alone leaves of a constant does not count as variation.
    noise = 8 * torch.finfo(torch.float64).eps * math.sqrt(count) * mean.abs()
    return mean, torch.where(deviation > noise, deviation, 1.0)


def _extremes(samples: Samples) -> tuple[Tensor, Tensor]:
    low = torch.full((samples.shape[0],), math.inf, dtype=torch.float64)
    high = -low
    for rows in _rows(samples):
        low, high = torch.minimum(low, rows.amin(0)), torch.maximum(high, rows.amax(0))
    return low, high


def _rows(samples: Samples) -> Iterator[Tensor]:
    """Chunks of the samples as float64 [M, C]: a row per pixel of an image, or per vector."""
    for chunk in chunks(samples):
        yield chunk.to(torch.float64).movedim(1, -1).reshape(-1, samples.shape[0])


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
