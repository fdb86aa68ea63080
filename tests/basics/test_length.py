"""The units of a length: against counting one update after the other."""

import itertools
from dataclasses import replace

import pytest

from dlopt.basics.length import Length
from tests.support.lengths import constant


@pytest.mark.parametrize("starts", [[0], [0, 3], [0, 7, 8], [0, 5, 15], [0, 20, 100]])
@pytest.mark.parametrize("per_epoch", [5, 7])
def test_updates_and_batches_count_alike(starts: list[int], per_epoch: int) -> None:
    length = replace(constant(60, per_epoch), starts=starts, counts=[1, 2, 5][: len(starts)])
    t = 0
    for updates in range(60):
        assert (length.batches(updates), length.updates_before(t)) == (t, updates)
        step = [count for start, count in zip(starts, (1, 2, 5), strict=False) if start <= t][-1]
        t = min(t + step, (t // per_epoch + 1) * per_epoch)
    for (_, before), (updates, after) in itertools.pairwise((n, length.batches(n)) for n in range(30)):
        assert all(length.updates_before(inside) == updates for inside in range(before + 1, after + 1))


def test_a_constant_batch_is_a_growth_by_one() -> None:
    length = constant(37, 10)
    assert not length.grows and length.epochs == 4
    assert all(length.batches(n) == length.updates_before(n) == n for n in range(100))
    assert [length.samples(n) for n in (0, 9, 10, 25)] == [0, 90, 100, 250]
    assert replace(length, epoch=95).samples(25) == 2 * 95 + 50  # the last batch of an epoch has 5 samples
    assert [length.nearest(samples) for samples in (0.0, 14.9, 15.0, 15.1, 250.0)] == [1, 1, 1, 2, 25]
    # steps=7 ended the first epoch after 7 batches: 30 later updates need three whole epochs and a part of a fourth.
    assert replace(length, skipped=3).epochs == 4 and replace(length, skipped=4).epochs == 5


def test_kept_in_a_checkpoint() -> None:
    length = replace(constant(60, 5), starts=(0, 3), counts=(1, 2), origin=(4, 6), skipped=1)
    assert Length.restored(length.state_dict()) == length
    for key, value in (("starts", [0]), ("counts", [1, 0]), ("origin", [1]), ("starts", [1, 3])):
        with pytest.raises(ValueError, match="starts"):
            Length.restored(length.state_dict() | {key: value})
