"""The length of a run in updates, batches, epochs and samples, and the conversion from one to another: `Length`.

The data, the schedule and the length of a run count in batches of `data.batch_size` samples. An update takes one of
them; once the batch has grown (`accumulate` with milestones), it takes several. Below, t is the number of batches
before an update; every epoch ends with an update, which may be smaller than the others.

Each unit has a type: the sum of two numbers is a plain one, which the type checker does not accept as either.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NewType, Self

UpdateCount = NewType("UpdateCount", int)
BatchCount = NewType("BatchCount", int)
SampleCount = NewType("SampleCount", int)
EpochCount = NewType("EpochCount", float)
NO_UPDATES, NO_BATCHES, NO_EPOCHS = UpdateCount(0), BatchCount(0), EpochCount(0)


@dataclass(frozen=True)
class Length:
    """The length of a run, and how many batches its updates take.

    Attributes:
        updates: of the whole run.
        horizon: batches over which the schedule runs.
        per_epoch: batches of an epoch.
        batch: samples of a batch; the last one of an epoch may have fewer. `epoch`: samples of an epoch.
        starts: t from which on an update takes the batches of the same index in `counts`; the first is 0.
        counts: batches of an update; one that never grows takes one.
        origin: updates, and t, from which conversions count: zeros, unless a batch that grows has skipped some.
        skipped: batches that steps=N has left out by ending the run of a constant batch within an epoch: continued, it
            begins the next epoch, but neither its schedule nor its length counts them.
        done: updates of the checkpoint from which the run continues; 0 for a new one.
    """

    updates: UpdateCount
    horizon: BatchCount
    per_epoch: BatchCount
    batch: SampleCount
    epoch: SampleCount
    starts: Sequence[int] = (0,)
    counts: Sequence[int] = (1,)
    origin: tuple[UpdateCount, BatchCount] = (NO_UPDATES, NO_BATCHES)
    skipped: BatchCount = NO_BATCHES
    done: UpdateCount = NO_UPDATES

    @property
    def grows(self) -> bool:
        return len(self.counts) > 1

    @property
    def epochs(self) -> int:
        """Epochs of the run; the last one may be partial."""
        return math.ceil(self.position(self.updates) / self.per_epoch)

    def count(self, t: float) -> int:
        """Returns the batches of the update at t; the last one of an epoch may have fewer."""
        return self.counts[bisect_right(self.starts, t) - 1]

    def batches(self, updates: UpdateCount) -> BatchCount:
        """Returns t after this number of updates."""
        left, now = updates - self.origin[0], int(self.origin[1])
        for end in self.starts[1:]:
            if now < end:
                number = min(updates_until(now, end, self.count(now), self.per_epoch), left)
                left, now = left - number, advanced(now, number, self.count(now), self.per_epoch)
        return BatchCount(advanced(now, left, self.count(now), self.per_epoch))

    def updates_before(self, t: BatchCount) -> UpdateCount:
        """Returns the updates before t."""
        updates, now = map(int, self.origin)
        for end in (*self.starts[1:], t):
            if now < end <= t:
                number = updates_until(now, end, self.count(now), self.per_epoch)
                updates, now = updates + number, advanced(now, number, self.count(now), self.per_epoch)
        return UpdateCount(updates)

    def position(self, updates: UpdateCount) -> BatchCount:
        """Returns the batches before the one that follows this number of updates, skipped ones included."""
        return BatchCount(self.batches(updates) + self.skipped)

    def epochs_of(self, t: float) -> EpochCount:
        """Returns the epochs of t batches."""
        return EpochCount(t / self.per_epoch)

    def samples(self, updates: UpdateCount) -> SampleCount:
        """Returns the samples of the first updates of a run."""
        epochs, rest = divmod(self.batches(updates), self.per_epoch)
        return SampleCount(epochs * self.epoch + rest * self.batch)

    def nearest(self, samples: float) -> UpdateCount:
        """Returns the number of updates, at least 1, whose samples are nearest: of two, the lower."""

        def distance(updates: int) -> float:
            return self.samples(UpdateCount(updates)) - samples

        updates = bisect_left(range(math.ceil(samples)), 0.0, key=distance)  # an update has a sample or more
        return UpdateCount(max(min(updates - 1, updates, key=lambda each: abs(distance(each))), 1))

    def state_dict(self) -> dict[str, Any]:
        """Returns its fields as plain values, for a checkpoint, whose own progress says what is done."""
        fields = {key: value for key, value in vars(self).items() if key != "done"}
        return {key: list(value) if isinstance(value, Sequence) else value for key, value in fields.items()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Self:
        """Raises `TypeError` and `ValueError` for fields that describe no length."""
        fields: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in state.items()}
        length = cls(**fields)
        has_pairs = len(length.starts) == len(length.counts) and len(length.origin) == 2
        if not has_pairs or length.starts[:1] != (0,) or min(length.counts) < 1:
            raise ValueError(f"starts {length.starts}, counts {length.counts}")
        return length


def updates_until(t: int, end: int, count: int, per_epoch: int) -> int:
    """Returns the number of updates of `count` batches that start in [t, end)."""
    next_epoch = (t // per_epoch + 1) * per_epoch
    if end <= next_epoch:
        return math.ceil((end - t) / count)
    epochs, rest = divmod(end - next_epoch, per_epoch)
    return math.ceil((next_epoch - t) / count) + epochs * math.ceil(per_epoch / count) + math.ceil(rest / count)


def advanced(t: int, updates: int, count: int, per_epoch: int) -> int:
    """Returns the batches after this number of updates of `count` batches, from t on."""
    next_epoch = (t // per_epoch + 1) * per_epoch
    left = math.ceil((next_epoch - t) / count)  # updates of this epoch
    if updates < left:
        return t + updates * count
    epochs, rest = divmod(updates - left, math.ceil(per_epoch / count))
    return next_epoch + epochs * per_epoch + rest * count
