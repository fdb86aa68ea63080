"""A batch that grows during a run, by the number of its micro-batches (`accumulate` with milestones).

The data, the schedule and the length of the run count in batches of `data.batch_size` samples, whose number a growing
batch does not change. An update takes one of them at first, and several of them later: its shapes and its memory are
those of one micro-batch. Below, t is the number of batches before an update; every epoch ends with an update, which may
be smaller than the others.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from dlopt.basics.errors import UserError
from dlopt.config.parameters import show
from dlopt.config.settings import Growth
from dlopt.data.batches import Batch, Batches
from dlopt.schedules.horizon import whole
from dlopt.training.step import EpochBatches


@dataclass(frozen=True)
class BatchGrowth:
    """How many batches of data.batch_size an update takes.

    Attributes:
        starts: t from which on an update takes the batches of the same index in `counts`; the first is 0.
        counts: batches of an update.
        per_epoch: batches of an epoch.
        done: (updates, t) from which `updates` and `batches` count: those of a checkpoint, or zeros.
    """

    starts: Sequence[int]
    counts: Sequence[int]
    per_epoch: int
    done: tuple[int, int] = (0, 0)

    def count(self, t: float) -> int:
        """Returns the batches of the update at t; the last one of an epoch may have fewer."""
        return self.counts[bisect_right(self.starts, t) - 1]

    def updates(self, t: int) -> int:
        """Returns the updates before t."""
        updates, now = self.done
        for end in (*self.starts[1:], t):
            if now < end <= t:
                number = _updates_until(now, end, self.count(now), self.per_epoch)
                updates, now = updates + number, _advanced(now, number, self.count(now), self.per_epoch)
        return updates

    def batches(self, updates: int) -> int:
        """Returns t after this number of updates."""
        left, now = updates - self.done[0], self.done[1]
        for end in self.starts[1:]:
            if now < end:
                number = min(_updates_until(now, end, self.count(now), self.per_epoch), left)
                left, now = left - number, _advanced(now, number, self.count(now), self.per_epoch)
        return _advanced(now, left, self.count(now), self.per_epoch)


def _updates_until(t: int, end: int, count: int, per_epoch: int) -> int:
    """Returns the number of updates of `count` batches that start in [t, end)."""
    next_epoch = (t // per_epoch + 1) * per_epoch
    if end <= next_epoch:
        return math.ceil((end - t) / count)
    epochs, rest = divmod(end - next_epoch, per_epoch)
    return math.ceil((next_epoch - t) / count) + epochs * math.ceil(per_epoch / count) + math.ceil(rest / count)


def _advanced(t: int, updates: int, count: int, per_epoch: int) -> int:
    """Returns the batches after this number of updates of `count` batches, from t on."""
    next_epoch = (t // per_epoch + 1) * per_epoch
    left = math.ceil((next_epoch - t) / count)  # updates of this epoch
    if updates < left:
        return t + updates * count
    epochs, rest = divmod(updates - left, math.ceil(per_epoch / count))
    return next_epoch + epochs * per_epoch + rest * count


def batch_growth(growth: Growth, batches: Batches, done: tuple[int, int] = (0, 0)) -> BatchGrowth:
    """Builds the growth of a run with these training batches. `done`: updates and t of the checkpoint that it resumes.

    Raises `UserError` for a batch that is larger than an epoch.
    """
    per_epoch, counts = len(batches), [number // growth.micro_batches[0] for number in growth.micro_batches]
    if counts[-1] > per_epoch:
        raise UserError(
            f"accumulate.micro_batches={show(growth.micro_batches)}: a batch of {counts[-1] * batches.batch_size} "
            f"samples is larger than an epoch ({batches.count}); use fewer micro-batches or a smaller data.batch_size"
        )

    def counted_from(done: tuple[int, int]) -> BatchGrowth:
        starts = _after_updates(growth.steps, counts, per_epoch, done) if growth.steps else _milestones(growth, batches)
        return BatchGrowth([0, *starts], counts, per_epoch, done)

    # After steps=N within an epoch, a resumed run continues with the next one: it has skipped the batches in between.
    from_start = counted_from((0, 0))
    return from_start if from_start.batches(done[0]) == done[1] else counted_from(done)


def _milestones(growth: Growth, batches: Batches) -> Iterator[int]:
    """Yields t of the first update at or after each milestone in epochs or samples."""
    for length in growth.epochs or ():
        yield math.ceil(whole(length * len(batches)))
    for samples in growth.samples or ():
        epochs, rest = divmod(samples, batches.count)
        yield epochs * len(batches) + math.ceil(rest / batches.batch_size)


def _after_updates(
    milestones: Sequence[int], counts: Sequence[int], per_epoch: int, done: tuple[int, int]
) -> Iterator[int]:
    """Yields t of each milestone in updates, given t after the updates `done[0]`; that t for milestones before them."""
    updates, t = done
    for milestone, count in zip(milestones, counts, strict=False):  # `count`: of the updates before the milestone
        if milestone > updates:
            t, updates = _advanced(t, milestone - updates, count, per_epoch), milestone
        yield t


class GrowingBatches:
    """Joins the training batches of an epoch to those of the updates.

    Args:
        announce: receives a line when the batch grows.
    """

    def __init__(self, batches: EpochBatches, growth: BatchGrowth, announce: Callable[[str], None]) -> None:
        self._batches, self._growth, self._announce = batches, growth, announce
        self._count = 1

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[Batch]:
        """Yields the batches of the updates of one epoch from batch `start` on.

        Their augmentation has the random numbers of a run whose batch does not grow. `step` is not used: all follows
        from the position in the data.
        """
        t = epoch * self._growth.per_epoch + start
        batches = self._batches.epoch(epoch, start, t)
        while parts := list(islice(batches, count := self._growth.count(t))):
            if count > self._count:
                update, samples = self._growth.updates(t) + 1, count * parts[0].total
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
    )
