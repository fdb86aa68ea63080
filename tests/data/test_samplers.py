import torch
from hypothesis import given
from hypothesis import strategies as st

from dlopt.data.samplers import Random, Sequential
from dlopt.random import generator


@given(count=st.integers(1, 300), seed=st.integers(0, 2**62), epoch=st.integers(0, 10**6))
def test_random_is_a_permutation_and_a_function_of_seed_and_epoch(count: int, seed: int, epoch: int) -> None:
    targets = torch.zeros(count, dtype=torch.int64)
    order = Random(targets=targets, seed=seed).order(epoch)
    assert order.sort().values.tolist() == list(range(count))
    other = Random(targets=targets, seed=seed)
    other.order(epoch + 1)
    assert torch.equal(other.order(epoch), order)
    assert torch.equal(order, torch.randperm(count, generator=generator("cpu", seed, epoch)))


def test_epochs_and_seeds_differ() -> None:
    targets = torch.zeros(100, dtype=torch.int64)
    orders = {tuple(Random(targets=targets, seed=s).order(e).tolist()) for s in range(3) for e in range(4)}
    assert len(orders) == 12


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    Random(targets=torch.zeros(9), seed=0).order(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_sequential() -> None:
    sampler = Sequential(targets=torch.zeros(5))
    assert len(sampler) == 5 and sampler.order(3).tolist() == [0, 1, 2, 3, 4]
