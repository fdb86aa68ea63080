"""Input normalization: modules that turn uint8 or float batches into what the model sees.

Their statistics come from the training split and live in buffers, hence in checkpoints. The buffers' dtype is the
dtype of the result.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dlopt.data.loading import chunks
from dlopt.data.samples import Samples


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
