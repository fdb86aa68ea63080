import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlopt.basics.random import generator, hashed, stream

counters = st.integers(0, 2**63 - 1)


def splitmix64(state: int) -> int:
    """Finalizer of Steele, Lea & Flood (2014, figure 16, mix64 variant 13)."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_matches_reference_splitmix64() -> None:
    """First numbers of the reference generator (Vigna's splitmix64.c) with seed 1234567."""
    gamma, state, numbers = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        state = (state + gamma) % 2**64
        numbers.append(splitmix64(state))
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_seed_without_counters() -> None:
    assert stream(1234567) == 6457827717110365317 >> 1


@given(counters, st.lists(counters, max_size=3))
def test_is_deterministic_with_63_bits(seed: int, more: list[int]) -> None:
    value = stream(seed, *more)
    assert value == stream(seed, *more)
    assert 0 <= value < 2**63
    torch.Generator().manual_seed(value)


@given(counters, counters, st.integers(0, 2**20))
def test_neighbouring_seeds_differ(seed: int, step: int, apart: int) -> None:
    near = {stream(seed, step), stream(seed, step + 1 + apart), stream(seed + 1 + apart, step), stream(seed)}
    assert len(near) == 4


def test_no_collisions_and_balanced_bits() -> None:
    values = [stream(seed, step) for seed in range(40) for step in range(500)]
    assert len(set(values)) == len(values)
    for bit in range(63):
        share = sum(value >> bit & 1 for value in values) / len(values)
        assert abs(share - 0.5) < 0.02, bit  # 5.6 standard deviations of 20000 fair coins


def test_one_more_counter_flips_half_of_the_bits() -> None:
    flips = [(stream(0, n) ^ stream(0, n + 1)).bit_count() for n in range(2000)]
    assert abs(sum(flips) / len(flips) - 31.5) < 0.5
    assert min(flips) > 8


def test_depends_on_the_order_of_counters() -> None:
    assert stream(0, 1, 2) != stream(0, 2, 1) != stream(1, 0, 2)
    assert len({stream(0), stream(0, 0), stream(0, 0, 0)}) == 3


def test_generator() -> None:
    first, again, other = generator("cpu", 3, 7), generator("cpu", 3, 7), generator("cpu", 3, 8)
    draws = torch.rand(4, generator=first)
    assert torch.equal(draws, torch.rand(4, generator=again))
    assert not torch.equal(draws, torch.rand(4, generator=other))


def test_hash_is_the_published_one() -> None:
    words = torch.randint(-(2**31), 2**31, (1000,), dtype=torch.int32)
    x = words.numpy().astype(np.uint32)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    assert np.array_equal(hashed(words.clone()).numpy().astype(np.uint32), x ^ (x >> np.uint32(15)))
