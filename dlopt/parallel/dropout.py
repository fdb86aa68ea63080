"""Dropout whose masks are a hash of the position in the global batch: equal on any number of ranks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dlopt.basics.random import hashed
from dlopt.data.batches import Batch
from dlopt.parallel.batch_shards import MicroBatchShard
from dlopt.parallel.collectives import ShardSpec

FeatureSpec = Callable[[Tensor], ShardSpec]
"""Maps an input to the features that it holds, where features are sharded over ranks."""

_LEVELS = 1 << 16  # of the probability: an activation is dropped by 16 random bits
_SELU_LIMIT = -1.7580993408473766  # the value of SELU at minus infinity, which alpha dropout sets (-lambda * alpha)


class CurrentShard:
    """Which samples the model is processing: its forward, and so its dropouts, get only the inputs."""

    def __init__(self) -> None:
        self.shard: MicroBatchShard | None = None  # None if the samples are not sharded

    @contextmanager
    def of(self, micro_batch: Batch) -> Iterator[None]:
        """Context in which the model processes a micro-batch."""
        self.shard = None if micro_batch.shard is None else MicroBatchShard(micro_batch.total, micro_batch.shard)
        try:
            yield
        finally:
            self.shard = None

    def __deepcopy__(self, memo: object) -> "CurrentShard":
        return self  # copies of a model process the same samples


class GlobalDropout(_DropoutNd):
    """torch's dropout with random numbers that depend on the sample's position in the global batch.

    A call draws one 32-bit key per sample of the global batch and one per two features; the hash of their sum decides.
    With masks from a generator's stream, a rank would have to draw the masks of all ranks. All ranks draw equally many
    numbers, whatever their shards: generators that start equal stay equal.

    The leading dimension of the input must be the sample. The probability is rounded to a multiple of 2^-16.

    Attributes:
        mask_dims: leading dimensions of the input along which the mask varies; None for all.
        is_alpha: keeps mean and variance of SELU units (Klambauer et al. 2017, equation 12).
    """

    mask_dims: int | None = None
    is_alpha = False
    current: CurrentShard
    feature_spec: FeatureSpec | None

    def forward(self, inputs: Tensor) -> Tensor:
        p = self._level / _LEVELS
        if not self.training or p == 0:
            return inputs
        if p == 1:
            return inputs * 0.0
        dropped = self._mask(inputs)
        if not self.is_alpha:
            return inputs.masked_fill(dropped, 0.0) * (1 / (1 - p))
        scale = ((_SELU_LIMIT**2 * p + 1) * (1 - p)) ** -0.5
        return inputs.masked_fill(dropped, _SELU_LIMIT) * scale - _SELU_LIMIT * p * scale

    @property
    def _level(self) -> int:
        return round(self.p * _LEVELS)

    def _mask(self, inputs: Tensor) -> Tensor:
        """Returns which activations to drop, in a shape that broadcasts to the inputs."""
        spec = None if self.feature_spec is None else self.feature_spec(inputs)
        shape = self._mask_shape(inputs.shape, spec)
        shard = self.current.shard or MicroBatchShard(len(inputs), slice(0, len(inputs)))
        if not len(inputs):  # of a rank without samples: it draws as the others do
            shard = shard._replace(local=slice(0, 0))
        if len(inputs) != shard.samples:
            raise RuntimeError(
                f"dropout got {len(inputs)} samples on a rank that has {shard.samples}: the leading dimension must be "
                "the sample under data parallelism"
            )
        samples, features = self._keys(shard.total, shape, inputs.device)
        bits = hashed(samples[shard.local] + features).view(torch.int16)  # two features per word
        dropped = bits[:, : math.prod(shape)] < self._level - _LEVELS // 2
        dropped = dropped.view(len(inputs), *shape)
        is_sharded = spec is not None and (self.mask_dims is None or spec.dim < self.mask_dims)
        return spec.select(dropped) if spec is not None and is_sharded else dropped

    def _mask_shape(self, inputs: torch.Size, spec: ShardSpec | None) -> list[int]:
        """Returns the shape of one sample's mask, for the features of all ranks."""
        shape = list(inputs)
        if spec is not None:
            shape[spec.dim] = spec.size
        varies = len(shape) if self.mask_dims is None else self.mask_dims
        return [size if dim < varies else 1 for dim, size in enumerate(shape)][1:]

    def _keys(self, total: int, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        words = (math.prod(shape) + 1) // 2
        low, high = -(1 << 31), 1 << 31
        samples = torch.randint(low, high, (total, 1), dtype=torch.int32, device=device)
        return samples, torch.randint(low, high, (words,), dtype=torch.int32, device=device)

    def discard(self, inputs: torch.Size, device: torch.device) -> None:
        """Draws the random numbers of a call with inputs of this shape, which another rank makes."""
        if self.training and 0 < self._level < _LEVELS:
            total = inputs[0] if self.current.shard is None else self.current.shard.total
            self._keys(total, self._mask_shape(inputs, None), device)


class Dropout(GlobalDropout, nn.Dropout):
    pass


class Dropout1d(GlobalDropout, nn.Dropout1d):
    mask_dims = 2


class Dropout2d(GlobalDropout, nn.Dropout2d):
    mask_dims = 2


class Dropout3d(GlobalDropout, nn.Dropout3d):
    mask_dims = 2


class AlphaDropout(GlobalDropout, nn.AlphaDropout):
    is_alpha = True


class FeatureAlphaDropout(GlobalDropout, nn.FeatureAlphaDropout):
    mask_dims, is_alpha = 2, True


_KINDS: dict[type[nn.Module], type[GlobalDropout]] = {  # by torch's class
    kind.__bases__[1]: kind for kind in (Dropout, Dropout1d, Dropout2d, Dropout3d, AlphaDropout, FeatureAlphaDropout)
}


def convert_dropout(
    module: nn.Module, current: CurrentShard, feature_specs: Mapping[nn.Module, FeatureSpec] | None = None
) -> None:
    """Turns torch's dropouts in `module` into `GlobalDropout`s, in place; subclasses of a user stay as they are.

    `feature_specs`: of dropouts whose features are sharded over ranks.
    """
    specs = feature_specs or {}
    for each in module.modules():
        kind = type(each) if isinstance(each, GlobalDropout) else _KINDS.get(type(each))
        if kind is not None:
            # Not replaced by another module: hooks, attributes and all references to this one stay valid.
            each.__class__ = kind
            each.current, each.feature_spec = current, specs.get(each)  # type: ignore[assignment]
