"""The samples of each rank. Micro-batches contain the same samples whatever the number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from dlopt.data.batches import STAND_IN, Augment, Batch, Position

BatchShard = Callable[[int], slice | Tensor]
"""Maps the size of a global batch to the positions of this rank's samples."""


class MicroBatchShard(NamedTuple):
    """This rank's samples of one micro-batch: the slice `local` of the `total` samples of all ranks."""

    total: int
    local: slice

    @property
    def samples(self) -> int:
        return int(self.local.stop - self.local.start)


def micro_batch_bounds(total: int, accumulate: int) -> list[tuple[int, int]]:
    """Returns (start, stop) of each micro-batch of a batch of `total` samples, split as by `Tensor.tensor_split`."""
    number = min(accumulate, total)
    size, longer = divmod(total, number)
    starts = [index * size + min(index, longer) for index in range(number + 1)]
    return list(pairwise(starts))


def local_slice(start: int, stop: int, rank: int, ranks: int) -> slice:
    """Returns a rank's slice of [start, stop); it may be empty. The slices of all ranks are adjacent and cover it.

    Samples 2i and 2i + 1 of the global batch stay on one rank, because mixing augmentations pair them, unless there is
    exactly one sample per rank.
    """
    count = stop - start

    # The ranks of a split pair would need each other's images, so odd bounds are moved down by one.
    def bound(index: int) -> int:
        if index == ranks:
            return stop
        position = start + count * index // ranks
        return position if count == ranks else max(position - position % 2, start)

    return slice(bound(rank), bound(rank + 1))


def local_slices(total: int, accumulate: int, rank: int, ranks: int) -> list[slice]:
    """Returns a rank's slice of each micro-batch, in positions of the global batch.

    The ranks take every second micro-batch in reverse order: the rank with the last samples of one then has the first
    of the next, and so both samples of a pair that an odd bound separates.
    """
    return [
        local_slice(start, stop, ranks - 1 - rank if number % 2 else rank, ranks)
        for number, (start, stop) in enumerate(micro_batch_bounds(total, accumulate))
    ]


def joined(slices: Sequence[slice]) -> list[slice]:
    """Drops empty slices and merges adjacent ones."""
    runs: list[slice] = []
    for each in slices:
        if runs and runs[-1].stop == each.start:
            runs[-1] = slice(runs[-1].start, each.stop)
        elif each.stop > each.start:
            runs.append(each)
    return runs


def micro_batch_shards(total: int, accumulate: int, rank: int, ranks: int) -> list[MicroBatchShard]:
    """Returns a rank's shard of each micro-batch, in positions of the micro-batch."""
    bounds = micro_batch_bounds(total, accumulate)
    slices = local_slices(total, accumulate, rank, ranks)
    return [
        MicroBatchShard(stop - start, slice(local.start - start, local.stop - start))
        for (start, stop), local in zip(bounds, slices, strict=True)
    ]


@dataclass(frozen=True)
class ShardedAugment:
    """Augments a rank's samples: several slices of the global batch, or the placeholder of none."""

    augment: Augment
    accumulate: int
    rank: int
    ranks: int

    def __call__(self, inputs: Tensor, targets: Tensor, **position: Unpack[Position]) -> tuple[Tensor, Tensor]:
        # One generator per global batch: drawing for all `total` samples takes 7 microseconds, a hash for each sample
        # 34. Every rank draws for all samples and uses the draws of its shard. Each slice starts from the same seed, so
        # that every sample gets the draws that it has in a single process.
        def augmented(inputs: Tensor, targets: Tensor, shard: slice, indices: Tensor) -> tuple[Tensor, Tensor]:
            generator.manual_seed(seed)
            local_position = position.copy()
            local_position["shard"], local_position["indices"] = shard, indices
            return self.augment(inputs, targets, **local_position)

        generator, indices = position["generator"], position["indices"]
        seed = generator.initial_seed()
        results, start = [], 0
        slices = joined(local_slices(position["total"], self.accumulate, self.rank, self.ranks))
        for local in slices or [STAND_IN]:
            stop = start + local.stop - local.start
            results.append(augmented(inputs[start:stop], targets[start:stop], local, indices[start:stop]))
            start = stop
        if len(results) == 1:
            return results[0]
        return torch.cat([inputs for inputs, _ in results]), torch.cat([targets for _, targets in results])


@dataclass(frozen=True)
class BatchSplit:
    """Splits a batch into micro-batches and over ranks; this process is one of the ranks.

    `scale`: of the weights of micro-batches, for a mode that averages gradients over ranks instead of summing them.
    """

    accumulate: int = 1
    rank: int = 0
    ranks: int = 1
    scale: int = 1

    @property
    def shard(self) -> BatchShard | None:
        """This rank's samples of a training batch; None for all, `STAND_IN` for none."""
        if self.ranks == 1:
            return None

        def index(total: int) -> slice | Tensor:
            slices = joined(local_slices(total, self.accumulate, self.rank, self.ranks)) or [STAND_IN]
            return slices[0] if len(slices) == 1 else torch.cat([torch.arange(s.start, s.stop) for s in slices])

        return index

    @property
    def evaluation_shard(self) -> BatchShard | None:
        """This rank's samples of an evaluation batch; None for all."""
        return None if self.ranks == 1 else lambda total: local_slice(0, total, self.rank, self.ranks)

    def augmentation(self, augment: Augment | None) -> Augment | None:
        """Returns the augmentation of this rank's samples, with the random draws of the global batch."""
        if self.ranks == 1 or augment is None:
            return augment
        return ShardedAugment(augment, self.accumulate, self.rank, self.ranks)

    def micro_batches(self, batch: Batch, accumulate: int) -> Sequence[Batch]:
        """Returns this rank's part of each of `accumulate` micro-batches, weighted by its fraction of the global batch.

        If it has no samples of one, its first sample of the batch is their placeholder, with weight 0. Of a batch that
        has grown, each of the joined batches is split as if it were alone: micro-batches keep their sizes.
        """
        if accumulate == 1 and self.ranks == 1 and not batch.joined:
            return (batch,)
        parts, start, first = [], 0, 0  # of this process's samples, and of those of all
        totals = batch.joined or (batch.total,)
        shards = [each for total in totals for each in micro_batch_shards(total, accumulate, self.rank, self.ranks)]
        for number, shard in enumerate(shards, 1):
            samples = slice(start, start + shard.samples) if shard.samples else STAND_IN
            parts.append(
                Batch(
                    batch.inputs[samples],
                    batch.targets[samples],
                    shard.total,
                    shard.local if shard.samples else STAND_IN,
                    first,
                    weight=shard.samples * self.scale / batch.total,
                    is_last=number == len(shards),
                    teacher_inputs=None if batch.teacher_inputs is None else batch.teacher_inputs[samples],
                    further={name: each[samples] for name, each in batch.further.items()},
                )
            )
            start += shard.samples
            first += shard.total
        return parts
