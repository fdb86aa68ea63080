"""Batches that grow during a run, by the number of their micro-batches (`accumulate` with milestones).

An update takes one batch of `data.batch_size` samples at first, and several of them later (`Length.count`): its shapes
and its memory are those of one micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch

from dlopt.basics.length import BatchCount, Length
from dlopt.data.batches import Batch
from dlopt.training.step import EpochBatches


class GrowingBatches:
    """Joins the training batches of an epoch to those of the updates.

    Args:
        announce: receives a line when the batch grows.
    """

    def __init__(self, batches: EpochBatches, length: Length, announce: Callable[[str], None]) -> None:
        self._batches, self._length, self._announce = batches, length, announce
        self._count = 1

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[Batch]:
        """Yields the batches of the updates of one epoch from batch `start` on.

        Their augmentation has the random numbers of a run whose batch does not grow. `step` is not used: all follows
        from the position in the data.
        """
        t = epoch * self._length.per_epoch + start
        batches = self._batches.epoch(epoch, start, t)
        while parts := list(islice(batches, count := self._length.count(t))):
            if count > self._count:
                update, samples = self._length.updates_before(BatchCount(t)) + 1, count * parts[0].total
                self._announce(f"update {update}: the batch grows to {samples:,} samples")
            self._count = count
            yield joined(parts)
            t += len(parts)


def joined(batches: Sequence[Batch]) -> Batch:
    """Joins batches to one; the only one is returned as it is."""
    if len(batches) == 1:
        return batches[0]
    totals = tuple(each.total for each in batches)
    batches = [each for each in batches if each.weight] or batches[:1]  # this process's own samples, if it has any
    teacher_inputs = [each.teacher_inputs for each in batches if each.teacher_inputs is not None]
    return Batch(
        torch.cat([each.inputs for each in batches]),
        torch.cat([each.targets for each in batches]),
        sum(totals),
        teacher_inputs=torch.cat(teacher_inputs) if teacher_inputs else None,
        joined=totals,
        further={name: torch.cat([each.further[name] for each in batches]) for name in batches[0].further},
    )
