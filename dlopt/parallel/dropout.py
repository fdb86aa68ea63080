"""Dropout whose masks depend on the position in the global batch: all numbers of ranks drop the same activations."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dlopt.data.batches import Batch
from dlopt.errors import UserError
from dlopt.parallel.batch_shards import MicroBatchShard
from dlopt.parallel.chain import ActivationSpec
from dlopt.parallel.collectives import ShardSpec


class CurrentShard:
    """Which samples the model is processing, for every dropout in it: a model's forward takes only the inputs."""

    def __init__(self) -> None:
        self.shard: MicroBatchShard | None = None  # None: the samples are not sharded

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


class GlobalDropout(nn.Module):
    """Any of torch's dropout modules, drawn for the samples of all ranks; this rank keeps the masks of its own.

    All ranks draw equally many numbers, whatever their shards: generators that start equal stay equal. The leading
    dimension of the input must be the sample.

    `feature_spec`: maps an input to the features that it holds, where features are sharded over ranks.
    """

    def __init__(
        self, dropout: _DropoutNd, current: CurrentShard, feature_spec: Callable[[Tensor], ShardSpec] | None = None
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.current = current
        self.feature_spec = feature_spec

    def forward(self, inputs: Tensor) -> Tensor:
        shard = self.current.shard
        if (shard is None and self.feature_spec is None) or not self.training or self.dropout.p == 0:
            return self.dropout(inputs)
        if shard is None:
            shard = MicroBatchShard(len(inputs), slice(0, len(inputs)))
        if len(inputs) != shard.samples:
            raise RuntimeError(
                f"dropout got {len(inputs)} samples on a rank that has {shard.samples}: the leading dimension must be "
                "the sample under data parallelism"
            )
        # A generator is a stream: the mask of a sample depends on how many numbers were drawn before. To drop what a
        # single process drops, a rank has to draw for the samples of the others, too, which costs time and memory that
        # grow with the number of ranks. It is the price of runs that are equal whatever their number of processes. The
        # local samples go into a zero tensor of the global shape, the dropout runs on all of it, and the local slice is
        # kept. This works for every kind of dropout (elementwise, channelwise, alpha) without a case for each. The
        # order of dimensions in memory is preserved, because torch may draw masks in memory order.
        shape, spec = [shard.total, *inputs.shape[1:]], self.feature_spec and self.feature_spec(inputs)
        if spec is not None:
            shape[spec.dim] = spec.size
            if _has_ambiguous_format(inputs.shape) and not _has_ambiguous_format(shape):
                raise UserError(
                    "model.dropout: with one channel or one pixel per process, the masks cannot match those of a "
                    "single process; use fewer processes, a wider model, or model.dropout=0"
                )
        full = ActivationSpec.of(inputs).restore_order(inputs.new_zeros(shape))
        if spec is None:
            full[shard.local] = inputs
            return self.dropout(full)[shard.local]
        full[shard.local] = spec.insert(full[shard.local], inputs)
        return spec.select(self.dropout(full)[shard.local])


def _has_ambiguous_format(shape: Sequence[int]) -> bool:
    """Whether features or maps of this shape have the same memory layout channels-first and channels-last."""
    return len(shape) > 2 and (shape[1] == 1 or math.prod(shape[2:]) == 1)


def replace_dropout(
    module: nn.Module,
    current: CurrentShard,
    feature_specs: Mapping[nn.Module, Callable[[Tensor], ShardSpec]] | None = None,
) -> None:
    """Replaces every dropout in `module` by a `GlobalDropout`; a shared dropout stays shared.

    `feature_specs`: see `GlobalDropout`, by dropout.
    """
    specs = feature_specs or {}
    replaced: dict[nn.Module, GlobalDropout] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _DropoutNd) and not isinstance(parent, GlobalDropout):
                parent._modules[name] = replaced.setdefault(child, GlobalDropout(child, current, specs.get(child)))
