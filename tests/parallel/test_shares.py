from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlopt.parallel.shares import PiecewiseAugment, cut, micro_batches, pieces, portions

totals, ranks = st.integers(1, 70), st.integers(1, 9)


@given(total=totals, accumulate=st.integers(1, 8))
def test_micro_batches_are_those_of_one_process(total: int, accumulate: int) -> None:
    parts = torch.arange(total).tensor_split(min(accumulate, total))
    assert [(int(part[0]), int(part[-1]) + 1) for part in parts] == micro_batches(total, accumulate)


@given(total=totals, ranks=ranks, accumulate=st.integers(1, 8))
def test_every_sample_is_one_ranks(total: int, ranks: int, accumulate: int) -> None:
    owned = [pieces(total, accumulate, rank, ranks) for rank in range(ranks)]
    positions = [i for micro in zip(*owned, strict=True) for own in micro for i in range(own.start, own.stop)]
    assert positions == list(range(total))


@given(count=totals, ranks=ranks)
def test_shares_are_as_even_as_pairs_allow(count: int, ranks: int) -> None:
    owned = [cut(0, count, rank, ranks) for rank in range(ranks)]
    sizes = [own.stop - own.start for own in owned]
    assert max(sizes) - min(sizes) <= 3
    if count != ranks:  # partners of mixing augmentations stay together
        assert all(own.start % 2 == 0 or own.start == count for own in owned)
    if count >= 2 * ranks:
        assert min(sizes) >= 1
    if count % (2 * ranks) == 0:
        assert len(set(sizes)) == 1


@given(total=totals, ranks=ranks, accumulate=st.integers(1, 5))
def test_portions_are_places_in_the_micro_batch(total: int, ranks: int, accumulate: int) -> None:
    bounds = micro_batches(total, accumulate)
    for rank in range(ranks):
        owned = pieces(total, accumulate, rank, ranks)
        for portion, (start, stop), own in zip(portions(total, accumulate, rank, ranks), bounds, owned, strict=True):
            assert portion.total == stop - start
            assert (portion.own.start + start, portion.own.stop + start) == (own.start, own.stop)
            assert portion.samples == own.stop - own.start


def noisy(inputs: Tensor, targets: Tensor, **place: Any) -> tuple[Tensor, Tensor]:
    draws = torch.rand(place["total"], generator=place["generator"])[place["part"], None]
    return inputs + draws + place["indices"][:, None] + 100 * place["epoch"], targets


@given(total=st.integers(1, 20), ranks=st.integers(1, 4), accumulate=st.integers(1, 4))
def test_an_augmentation_in_pieces_equals_the_whole(total: int, ranks: int, accumulate: int) -> None:
    inputs, targets = torch.randn(total, 3), torch.arange(total)

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    everything = slice(0, total)
    whole, _ = noisy(inputs, targets, generator=draws(), total=total, part=everything, indices=targets, epoch=2)
    for rank in range(ranks):
        own = torch.cat([torch.arange(p.start, p.stop) for p in pieces(total, accumulate, rank, ranks)])
        augment = PiecewiseAugment(noisy, accumulate, rank, ranks)
        found, labels = augment(
            inputs[own], targets[own], generator=draws(), total=total, part=own, indices=targets[own], epoch=2
        )
        assert torch.equal(found, whole[own])
        assert torch.equal(labels, targets[own])
