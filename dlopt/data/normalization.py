"""Input normalization: modules that map uint8 or float batches to model inputs.

Their statistics are computed on the training split and kept in buffers, hence in checkpoints. The outputs have the
buffers' dtype.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlopt.basics.cache import cache_file, exclusive, load_arrays, save_arrays
from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Positive
from dlopt.data.loading import chunks
from dlopt.data.samples import Dataset, InMemory, Samples
from dlopt.data.tables.columns import FeatureColumns

_MAX_ROUNDING = 1e-4  # of an output, beyond which samples are centred first


class Centring(nn.Module):
    """A normalization that subtracts `center` from values whose differences its sums would lose.

    In fp32, x * scale + shift of a feature from 16,000,000 to 16,000,009 rounds by 0.2 standard deviations, while
    x - center is exact. All other values are left as they are: their results stay the same to the last bit.

    `center`: 0 where nothing is subtracted; None, and not part of a checkpoint, if nothing is subtracted at all.
    """

    center: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", None)

    def centred(self, inputs: Tensor) -> Tensor:
        return inputs if self.center is None else torch.sub(inputs, self.center)

    def _centre(self, mean: Tensor, factor: Tensor | float, like: Tensor) -> Tensor:
        """Sets and returns (in float64) the center, for inputs of this mean that are multiplied by `factor`.

        `like`: has the dtype and the device of the normalization.
        """
        rounding = torch.finfo(like.dtype).eps * (mean * factor).abs()
        center = torch.where(rounding > _MAX_ROUNDING, mean, 0.0).to(like.dtype)
        self.center = center.to(like.device) if bool(center.any()) else None
        return center.double()

    def _set(self, **constants: Tensor) -> None:
        """Sets the buffers of these names from float64 values, and `center`."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        saved = {name.removeprefix(prefix): each for name, each in state_dict.items() if name.startswith(prefix)}
        *_, like = self.buffers()
        center = saved.pop("center", None)
        self.center = None if center is None else torch.zeros_like(like)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        shapes = {name: buffer.shape for name, buffer in self.named_buffers()}  # others were reported
        is_wider = all(each.dtype == torch.float64 != like.dtype for each in saved.values())
        if center is None and is_wider and shapes == {name: each.shape for name, each in saved.items()}:
            # A run in fp64 needs no center; its evaluation in another precision and its export in fp32 may need one.
            self._set(**{name: each.cpu() for name, each in saved.items()})


class ScaleShift(Centring):
    """(x - center) * scale + shift, with one of each per channel of images (C, H, W) or per feature of vectors (F,)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, *, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        shape = (input_shape[0],) + (1,) * (len(input_shape) - 1)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("shift", torch.zeros(shape))

    def fit(self, samples: Samples) -> None:
        """Computes the statistics on the training samples (none here)."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.mul(self.centred(inputs), self.scale).add_(self.shift)

    def _set(self, scale: Tensor, shift: Tensor) -> None:  # type: ignore[override]
        scale, shift = scale.double().view_as(self.scale), shift.double().view_as(self.shift)
        center = self._centre(-shift / scale, scale, self.scale)
        self.scale.copy_(scale)
        self.shift.copy_(shift + center * scale)
        if not bool(self.scale.isfinite().all()):
            number = int((~self.scale.isfinite()).nonzero()[0, 0]) + 1
            raise UserError(
                f"normalize: the values of feature {number} differ by too little for {self.scale.dtype}, whose largest "
                "number is 3e38; multiply them by a constant"
            )


class Nothing(ScaleShift):
    """Converts to floating point only; images stay 0..255."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.scale.dtype)


class Unit(ScaleShift):
    """Scales to 0..1: images from 0..255, features from their training minimum and maximum (constant ones to 0)."""

    def fit(self, samples: Samples) -> None:
        if len(samples.shape) == 3 and samples.fetch(torch.tensor([0])).dtype == torch.uint8:
            self._set(torch.full_like(self.scale, 1 / 255), torch.zeros_like(self.shift))
            return
        low = torch.full((samples.shape[0],), math.inf, dtype=torch.float64)
        high = -low
        for rows in _rows(samples):
            low, high = torch.minimum(low, rows.amin(0)), torch.maximum(high, rows.amax(0))
        width = torch.where(high > low, high - low, 1.0)
        self._set(1 / width, -low / width)


class Standardize(ScaleShift):
    """Scales to mean 0 and standard deviation 1 over the training samples; constant values become 0.

    `per`: for images, "channel" takes one mean and deviation per channel, "pixel" one per channel and position. Vectors
    have one per feature.
    """

    def __init__(self, *, per: Literal["channel", "pixel"], input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape=input_shape)
        self._per_pixel = per == "pixel"
        if self._per_pixel:
            self.register_buffer("scale", torch.ones(input_shape))
            self.register_buffer("shift", torch.zeros(input_shape))

    def fit(self, samples: Samples) -> None:
        mean, deviation = moments(samples, per_pixel=self._per_pixel)
        self._set(1 / deviation, -mean / deviation)

    def forward(self, inputs: Tensor) -> Tensor:
        if self._per_pixel and inputs.shape[1:] != self.scale.shape:
            raise UserError(
                f"normalize.per=pixel: fitted to samples of {list(self.scale.shape)}, not {list(inputs.shape[1:])}; "
                "use an augmentation that keeps the size, or normalize.per=channel"
            )
        return super().forward(inputs)


class MeanPixel(ScaleShift):
    """scale * (x - mean), with one mean per channel or feature.

    `values`: fixed means, in the units of the data (images: 0..255); None for the means of the training samples.
    """

    def __init__(self, *, values: tuple[float, ...] | None, scale: Positive, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape=input_shape)
        self._fixed = values
        self._factor = scale
        if values is not None:
            _check_count("values", values, input_shape)
            self._set_mean(torch.tensor(values, dtype=torch.float64))

    def fit(self, samples: Samples) -> None:
        # Fixed means again, because the buffers may have another dtype now.
        self._set_mean(moments(samples)[0] if self._fixed is None else torch.tensor(self._fixed, dtype=torch.float64))

    def _set_mean(self, mean: Tensor) -> None:
        self._set(torch.full_like(self.scale, self._factor), -self._factor * mean)


class Fixed(ScaleShift):
    """Computes (x - mean) / std with given constants, for networks that were trained with them.

    One value per channel or feature; a grey image takes the average of several values. Images: in units of 0..1, as
    usual (ImageNet's mean is 0.485, 0.456, 0.406), although the images have values 0..255.
    """

    def __init__(self, *, mean: tuple[float, ...], std: tuple[Positive, ...], input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape=input_shape)
        self._mean = _constants("mean", mean, input_shape)
        self._std = _constants("std", std, input_shape)

    def fit(self, samples: Samples) -> None:
        """Sets the constants in the units of the samples."""
        # The same unit as in augmentation and pictures: floating-point images may have values 0..255, too.
        unit = samples.white() if len(samples.shape) == 3 else 1.0
        for name, values in (("mean", self._mean), ("std", self._std)):
            if unit == 255.0 and values.abs().max() > 1:
                shown = [round(value, 4) for value in values.tolist()]
                raise UserError(f"normalize.{name}={shown}: images have the range 0..1 here; divide by 255")
        self._set(1 / (self._std * unit), -self._mean / self._std)


def _constants(name: str, values: tuple[float, ...], input_shape: tuple[int, ...]) -> Tensor:
    if len(input_shape) == 3 and input_shape[0] == 1 and values:
        return torch.tensor(values, dtype=torch.float64).mean(0, keepdim=True)
    _check_count(name, values, input_shape)
    return torch.tensor(values, dtype=torch.float64)


def _check_count(name: str, values: tuple[float, ...], input_shape: tuple[int, ...]) -> None:
    if len(values) != input_shape[0]:
        raise UserError(
            f"normalize.{name}={list(values)}: has {len(values)} values; the data has {input_shape[0]} "
            f"{'channels' if len(input_shape) == 3 else 'features'}"
        )


class MeanImage(Centring):
    """scale * (x - mean training image) (Krizhevsky et al. 2012), pixel by pixel in 0..255.

    `mean`: what the center leaves of it.
    """

    mean: Tensor

    def __init__(self, *, scale: Positive, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self._factor = scale
        self.register_buffer("mean", torch.zeros(input_shape))

    def fit(self, samples: Samples) -> None:
        """Computes the mean of the training samples."""
        total = torch.zeros(samples.shape, dtype=torch.float64)
        for chunk in finite_chunks(samples):
            total += chunk.sum(0, dtype=torch.float64)
        self._set(total / len(samples))

    def _set(self, mean: Tensor) -> None:  # type: ignore[override]
        self.mean.copy_(mean - self._centre(mean, self._factor, self.mean))

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.shape[1:] != self.mean.shape:
            raise UserError(
                f"normalize=mean_image: the mean image is {list(self.mean.shape)}, the images are "
                f"{list(inputs.shape[1:])}; use an augmentation that keeps the size, or normalize=mean_pixel"
            )
        return torch.sub(self.centred(inputs), self.mean).mul_(self._factor)


def moments(samples: Samples, *, per_pixel: bool = False) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation per channel or feature, float64; the deviation of a constant is 1.

    `per_pixel`: per channel and position of an image, flattened.
    """
    pool = PooledMoments()
    for rows in _rows(samples, per_pixel):
        mean = rows.mean(0)
        pool.merge(len(rows), mean, rows.sub_(mean).square_().sum(0))
    deviation = (pool.squares / pool.count).sqrt()
    # Rounding leaves a tiny deviation of constants; it does not count as variation.
    noise = 8 * torch.finfo(torch.float64).eps * math.sqrt(pool.count) * pool.mean.abs()
    return pool.mean, torch.where(deviation > noise, deviation, 1.0)


class PooledMoments:
    """Count, mean and sum of squared deviations, merged batch by batch (Chan, Golub & LeVeque 1983).

    The difference of the mean square and the squared mean would suffer from cancellation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        delta, total = mean - self.mean, self.count + count
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


def covariance(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns mean [D] and covariance [D, D] (divided by N) of the rows of all chunks [n, D], float64."""
    chunks = iter(chunks)
    first = next(chunks)
    start = first.mean(0)  # sums about a value near the mean avoid cancellation
    count, total, products = 0, torch.zeros_like(start), start.new_zeros(len(start), len(start))
    for chunk in itertools.chain([first], chunks):
        rows = chunk - start
        count += len(rows)
        total += rows.sum(0)
        products.addmm_(rows.T, rows)  # in place: the largest matrices fill half a gigabyte
    offset = total / count
    return start + offset, products.div_(count).sub_(torch.outer(offset, offset))


def _rows(samples: Samples, per_pixel: bool = False) -> Iterator[Tensor]:
    """Yields chunks of the samples as float64 [M, C]: one row per pixel of an image, or per sample (`per_pixel`)."""
    for chunk in finite_chunks(samples):
        if per_pixel:
            yield chunk.flatten(1).to(torch.float64, copy=True)
            continue
        yield chunk.to(torch.float64).movedim(1, -1).reshape(-1, samples.shape[0])


def finite_chunks(samples: Samples) -> Iterator[Tensor]:
    """Yields all inputs in chunks. Raises `UserError` for a value that is not finite in float32, which names it."""
    start = 0
    for chunk in chunks(samples):
        # The sum is not finite if a value is not: faster than a look at each, which follows only then.
        if chunk.is_floating_point() and not bool(chunk.sum(dtype=torch.float64).isfinite()):
            row, *position = (~chunk.isfinite()).nonzero()[0].tolist()
            where = f"feature {position[0] + 1}" if len(position) == 1 else f"the value at {position}"
            raise UserError(
                f"data: {where} of training sample {start + row + 1} is {chunk[(row, *position)].item()}: it is not a "
                "finite number, or too large for float32; correct it, or remove the sample"
            )
        start += len(chunk)
        yield chunk


_VERSION = "2"
_CACHE_MIN_SAMPLES = 1000  # fewer are quickly read again


def fit(normalize: nn.Module, dataset: Dataset, *, count: int | None, kind: str) -> None:
    """Fits `normalize` to the training samples; if they are not in memory, to at most `count` evenly spaced ones.

    Caches the statistics of large sets for as long as their `Samples.state` is unchanged, as that of image files.

    Args:
        kind: identifies the normalization and its settings in the cache.
    """
    samples = dataset.train
    if not dataset.in_memory and count is not None and len(samples) > count:
        samples = samples.select(torch.linspace(0, len(samples) - 1, count, dtype=torch.float64).round().long())
    state = None if dataset.in_memory or len(samples) < _CACHE_MIN_SAMPLES else samples.state()
    if state is None:
        normalize.fit(samples)  # type: ignore[operator]
        return
    path = cache_file("statistics", _VERSION, kind, state.hex())
    with exclusive(path):
        shapes = {name: tuple(value.shape) for name, value in normalize.state_dict().items()}
        cached = load_arrays(path)
        if cached is not None and shapes.items() <= {name: value.shape for name, value in cached.items()}.items():
            normalize.load_state_dict({name: torch.from_numpy(value) for name, value in cached.items()})
            return
        normalize.fit(samples)  # type: ignore[operator]
        save_arrays(path, {name: value.cpu().numpy() for name, value in normalize.state_dict().items()})


def standardized(dataset: Dataset, saved: FeatureColumns | None, *, is_enabled: bool = True) -> Dataset:
    """Returns a dataset of numbers whose targets have mean 0 and standard deviation 1 in the training set.

    Several values per sample have one mean and one deviation; a constant only becomes 0. Loss and outputs are then in
    these units, and the columns of the dataset have the constants, with which predictions are in the unit of the label.

    Args:
        saved: columns of the training data, whose constants hold for other data, too; None to compute them.
        is_enabled: otherwise targets are only scaled if those of the training data are; all become float32.
    """
    if dataset.classes is not None or dataset.layout is not None:
        return dataset
    present: list[Any] = [each for each in (dataset.train, dataset.val, dataset.test) if each is not None]
    if not is_enabled and (saved is None or saved.scale == 1.0):
        for samples in present:
            if samples.targets.dtype == torch.float64:
                samples.targets = samples.targets.float()
        return dataset
    if saved is None:
        known = dataset.train.targets.to(torch.float64, copy=True).reshape(-1, 1)  # which `moments` overwrites
        center, deviation = moments(InMemory(known, known))
        saved = FeatureColumns((), "", mean=center.item(), scale=deviation.item())
    mean, scale = saved.mean, saved.scale
    for samples in present:
        samples.targets = ((samples.targets.double() - mean) / scale).float()
    note = f"targets and outputs: (value - {mean:.6g}) / {scale:.6g} (data.standardize_target)"
    columns = dataset.columns or FeatureColumns((), "target")
    return replace(dataset, columns=replace(columns, mean=mean, scale=scale), notes=(*dataset.notes, note))
