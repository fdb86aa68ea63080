"""Random, sequential and with-replacement samplers, and the contract of all samplers: determinism and sharding."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.random import generator
from dlopt.data.batches import Batches, Delivery
from dlopt.data.samplers import (
    ClassBalanced,
    ClassInterleaved,
    ClassSorted,
    Diverse,
    HardExamples,
    LossAwareSampler,
    Random,
    Sampler,
    Sequential,
    WithReplacement,
)
from dlopt.data.samples import InMemory

ALL: dict[str, Callable[..., Sampler]] = {
    "random": lambda s, seed=3: Random(targets=s.targets, seed=seed, epoch_size=None),
    "sequential": lambda s, seed=3: Sequential(targets=s.targets),
    "with_replacement": lambda s, seed=3: WithReplacement(targets=s.targets, seed=seed),
    "class_interleaved": lambda s, seed=3: ClassInterleaved(targets=s.targets, seed=seed),
    "class_sorted": lambda s, seed=3: ClassSorted(targets=s.targets, seed=seed),
    "class_balanced": lambda s, seed=3: ClassBalanced(targets=s.targets, seed=seed),
    "diverse": lambda s, seed=3: Diverse(targets=s.targets, samples=s, batch_size=8, seed=seed, clusters=3),
    "hard_examples": lambda s, seed=3: HardExamples(targets=s.targets, seed=seed, floor=0.2, max_draws=4.0),
}
STATELESS = [name for name in ALL if name != "hard_examples"]
RANDOM = [name for name in ALL if name != "sequential"]


@given(count=st.integers(1, 300), seed=st.integers(0, 2**62), epoch=st.integers(0, 10**6))
def test_random_is_a_permutation_and_a_function_of_seed_and_epoch(count: int, seed: int, epoch: int) -> None:
    targets = torch.zeros(count, dtype=torch.int64)
    order = Random(targets=targets, seed=seed, epoch_size=None).order(epoch)
    assert order.sort().values.tolist() == list(range(count))
    other = Random(targets=targets, seed=seed, epoch_size=None)
    other.order(epoch + 1)
    assert torch.equal(other.order(epoch), order)
    assert torch.equal(order, torch.randperm(count, generator=generator("cpu", seed, epoch)))


def test_epoch_size_takes_the_first_samples_of_each_order() -> None:
    targets = torch.zeros(100, dtype=torch.int64)
    part, full = (Random(targets=targets, seed=3, epoch_size=size) for size in (30, None))
    assert len(part) == 30 and len(Random(targets=targets, seed=3, epoch_size=200)) == 100
    for epoch in range(3):
        assert torch.equal(part.order(epoch), full.order(epoch)[:30])


def test_sequential() -> None:
    sampler = Sequential(targets=torch.zeros(5))
    assert len(sampler) == 5 and sampler.order(3).tolist() == [0, 1, 2, 3, 4]


def test_with_replacement_draws_independently() -> None:
    sampler = WithReplacement(targets=torch.zeros(1000), seed=5)
    counts = torch.stack([sampler.order(epoch).bincount(minlength=1000) for epoch in range(200)]).double()
    assert len(sampler) == 1000 and bool((counts.sum(1) == 1000).all())
    assert abs(float((counts == 0).double().mean()) - (1 - 1 / 1000) ** 1000) < 0.005  # 5 standard errors are 0.003
    assert abs(float(counts.var(0).mean()) - 1) < 0.03
    total = counts.sum(0)
    assert abs(float(((total - 200) ** 2 / 200).sum()) - 999) < 5 * (2 * 999) ** 0.5  # chi-square


@pytest.mark.parametrize("name", ALL)
def test_orders_are_indices_and_the_same_in_every_process(numbered: Callable[..., InMemory], name: str) -> None:
    samples = numbered(50)
    first, second = ALL[name](samples), ALL[name](samples)
    before = torch.get_rng_state()
    orders = [first.order(epoch) for epoch in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    for epoch in range(4) if name not in STATELESS else (3, 0, 2, 1):
        again = second.order(epoch)
        assert torch.equal(again, orders[epoch]) and torch.equal(second.order(epoch), again)
        assert again.dtype == torch.int64 and len(again) == len(second)
        assert int(again.min()) >= 0 and int(again.max()) < 50
    assert (len({tuple(order.tolist()) for order in orders}) == 4) == (name in RANDOM)


@pytest.mark.parametrize("name", RANDOM)
def test_seeds_differ(numbered: Callable[..., InMemory], name: str) -> None:
    samples = numbered(50)
    assert not torch.equal(ALL[name](samples).order(0), ALL[name](samples, 4).order(0))


def batches(samples: InMemory, name: str, rank: int = 0, ranks: int = 1) -> Batches:
    def shard(total: int) -> slice:
        return slice(rank * total // ranks, (rank + 1) * total // ranks)

    sampler = ALL[name](samples)
    return Batches(samples, Delivery(torch.device("cpu"), True, 0), batch_size=8, sampler=sampler, shard=shard)


def numbers(inputs: torch.Tensor) -> list[int]:
    return inputs[:, 0, 0, 0].int().tolist()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ALL)
def test_ranks_share_every_batch_without_overlap(numbered: Callable[..., InMemory], name: str, ranks: int) -> None:
    samples = numbered(50)
    whole = [numbers(inputs) for inputs, _ in batches(samples, name).epoch(0)]
    parts = [[numbers(inputs) for inputs, _ in batches(samples, name, r, ranks).epoch(0)] for r in range(ranks)]
    assert whole == [list(itertools.chain(*shares)) for shares in zip(*parts, strict=True)]
    assert list(itertools.chain(*whole)) == ALL[name](samples).order(0).tolist()


@pytest.mark.parametrize("name", ALL)
def test_epoch_resumes_where_it_stopped(numbered: Callable[..., InMemory], name: str) -> None:
    samples = numbered(50)
    whole = [numbers(inputs) for inputs, _ in batches(samples, name).epoch(2)]
    assert [numbers(inputs) for inputs, _ in batches(samples, name).epoch(2, start=3)] == whole[3:]


@pytest.mark.parametrize("name", ALL)
def test_single_sample(numbered: Callable[..., InMemory], name: str) -> None:
    assert ALL[name](numbered(1)).order(0).tolist() == [0]


def test_only_hard_examples_is_loss_aware(numbered: Callable[..., InMemory]) -> None:
    assert [name for name in ALL if isinstance(ALL[name](numbered(5)), LossAwareSampler)] == ["hard_examples"]
