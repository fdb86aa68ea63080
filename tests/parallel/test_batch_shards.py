from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dlopt.data.batches import STAND_IN, Batch
from dlopt.parallel.batch_shards import (
    BatchSplit,
    ShardedAugment,
    joined,
    local_slice,
    local_slices,
    micro_batch_bounds,
    micro_batch_shards,
)

totals, ranks = st.integers(1, 70), st.integers(1, 9)


@given(total=totals, accumulate=st.integers(1, 8))
def test_micro_batch_bounds_match_tensor_split(total: int, accumulate: int) -> None:
    chunks = torch.arange(total).tensor_split(min(accumulate, total))
    assert [(int(part[0]), int(part[-1]) + 1) for part in chunks] == micro_batch_bounds(total, accumulate)


@given(total=totals, ranks=ranks, accumulate=st.integers(1, 8))
def test_local_slices_cover_every_sample_once(total: int, ranks: int, accumulate: int) -> None:
    slices = [local_slices(total, accumulate, rank, ranks) for rank in range(ranks)]
    positions = [i for each in slices for local in each for i in range(local.start, local.stop)]
    assert sorted(positions) == list(range(total))


@given(total=totals, ranks=ranks, accumulate=st.integers(1, 8))
def test_ranks_have_both_samples_of_every_pair(total: int, ranks: int, accumulate: int) -> None:
    """Also of the pairs that odd bounds of micro-batches separate, if these have more samples than there are ranks."""
    assume(all(stop - start > ranks for start, stop in micro_batch_bounds(total, accumulate)))
    for rank in range(ranks):
        for local in joined(local_slices(total, accumulate, rank, ranks)):
            assert local.start % 2 == 0 and (local.stop % 2 == 0 or local.stop == total)


@given(count=totals, ranks=ranks)
def test_local_slices_are_even_and_keep_pairs_together(count: int, ranks: int) -> None:
    slices = [local_slice(0, count, rank, ranks) for rank in range(ranks)]
    sizes = [local.stop - local.start for local in slices]
    assert max(sizes) - min(sizes) <= 3
    if count != ranks:  # partners of mixing augmentations stay together
        assert all(local.start % 2 == 0 or local.start == count for local in slices)
    if count >= 2 * ranks:
        assert min(sizes) >= 1
    if count % (2 * ranks) == 0:
        assert len(set(sizes)) == 1


@given(total=totals, ranks=ranks, accumulate=st.integers(1, 5))
def test_micro_batch_shards_match_local_slices(total: int, ranks: int, accumulate: int) -> None:
    bounds = micro_batch_bounds(total, accumulate)
    for rank in range(ranks):
        slices = local_slices(total, accumulate, rank, ranks)
        for shard, (start, stop), local in zip(
            micro_batch_shards(total, accumulate, rank, ranks), bounds, slices, strict=True
        ):
            assert shard.total == stop - start
            assert (shard.local.start + start, shard.local.stop + start) == (local.start, local.stop)
            assert shard.samples == local.stop - local.start


@given(total=totals, ranks=ranks, accumulate=st.integers(1, 5))
def test_positions_are_those_of_the_global_batch(total: int, ranks: int, accumulate: int) -> None:
    """Every sample is at its place, on one rank; a rank without samples of a micro-batch has one with weight 0."""
    found: dict[int, int] = {}
    for rank in range(ranks):
        split = BatchSplit(accumulate, rank, ranks)
        samples = torch.arange(total) if split.shard is None else torch.arange(total)[split.shard(total)]
        weight = 1.0 if split.shard is None or split.shard(total) is not STAND_IN else 0.0
        parts = split.micro_batches(Batch(samples, samples, total, weight=weight), accumulate)
        assert sum(part.weight for part in parts) == pytest.approx(len(samples) * weight / total)
        for part in parts:
            assert len(part.inputs) == part.positions.stop - part.positions.start >= 1
            if part.weight:
                found |= dict(zip(part.inputs.tolist(), range(total)[part.positions], strict=True))
    assert found == {number: number for number in range(total)}


def noisy(inputs: Tensor, targets: Tensor, **position: Any) -> tuple[Tensor, Tensor]:
    draws = torch.rand(position["total"], generator=position["generator"])[position["shard"], None]
    return inputs + draws + position["indices"][:, None] + 100 * position["epoch"], targets


@given(total=st.integers(1, 20), ranks=st.integers(1, 4), accumulate=st.integers(1, 4))
def test_sharded_augmentation_matches_full_batch(total: int, ranks: int, accumulate: int) -> None:
    inputs, targets = torch.randn(total, 3), torch.arange(total)

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    all_samples = slice(0, total)
    full, _ = noisy(inputs, targets, generator=draws(), total=total, shard=all_samples, indices=targets, epoch=2)
    for rank in range(ranks):
        local = torch.cat([torch.arange(p.start, p.stop) for p in local_slices(total, accumulate, rank, ranks)])
        augment = ShardedAugment(noisy, accumulate, rank, ranks)
        augmented, labels = augment(
            inputs[local], targets[local], generator=draws(), total=total, shard=local, indices=targets[local], epoch=2
        )
        assert torch.equal(augmented, full[local])
        assert torch.equal(labels, targets[local])


def test_only_several_ranks_shard_the_augmentation() -> None:
    def augment(*_: Any, **__: Any) -> Any: ...

    assert BatchSplit().augmentation(augment) is augment
    sharded = BatchSplit(accumulate=3, rank=1, ranks=2).augmentation(augment)
    assert sharded == ShardedAugment(augment, 3, 1, 2)
    assert BatchSplit(rank=1, ranks=2).augmentation(None) is None
