"""Closed forms against step-by-step simulations and published tables."""

import math

import numpy as np
import pytest

from dlopt.lab.scaling import simulation as costs
from dlopt.lab.scaling.simulation import Link

LINK = Link(latency=3e-6, bandwidth=5e9)


def simulated_ring(size: float, ranks: int, link: Link) -> tuple[float, float]:
    """Simulates a ring all-reduce with data; returns its seconds and the bytes sent per rank.

    Every rank passes on one of p chunks, 2 (p - 1) times.
    """
    chunks = np.random.default_rng(0).standard_normal((ranks, ranks))  # [rank, part]
    expected, clock, sent = chunks.sum(0), np.zeros(ranks), 0.0
    for step in range(2 * (ranks - 1)):
        passed = [(rank, (rank - step) % ranks) for rank in range(ranks)]
        values = [chunks[rank, chunk] for rank, chunk in passed]
        arrival = clock + link.latency + size / ranks / link.bandwidth
        sent += size / ranks
        for (rank, chunk), value in zip(passed, values, strict=True):
            to = (rank + 1) % ranks
            chunks[to, chunk] = chunks[to, chunk] + value if step < ranks - 1 else value
        clock = np.maximum(arrival, np.roll(arrival, 1))
    assert chunks == pytest.approx(np.tile(expected, (ranks, 1)))
    return float(clock.max()), sent


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ring_matches_step_by_step_simulation(ranks: int) -> None:
    seconds, sent = simulated_ring(1e6, ranks, LINK)
    assert costs.ring_all_reduce(1e6, ranks, LINK) == pytest.approx(seconds)
    assert sent == pytest.approx(2 * 1e6 * (ranks - 1) / ranks)
    assert costs.ring_gather(1e6, ranks, LINK) == pytest.approx(seconds / 2)


def test_single_rank_sends_nothing() -> None:
    assert costs.all_reduce(1e6, 1, LINK) == costs.two_level_all_reduce(1e6, 1, 1, LINK, LINK) == 0


def test_uses_trees_for_small_messages_and_rings_for_large_ones() -> None:
    assert costs.all_reduce(100.0, 64, LINK) == pytest.approx(2 * 6 * 3e-6 + 200 / 5e9)
    assert costs.all_reduce(1e9, 8, LINK) == costs.ring_all_reduce(1e9, 8, LINK) < costs.tree_all_reduce(1e9, 8, LINK)


def test_two_level_collectives_reduce_to_one_level() -> None:
    slow = Link(1e-3, 1e6)
    assert costs.two_level_all_reduce(1e6, 8, 1, LINK, slow) == costs.ring_all_reduce(1e6, 8, LINK)
    assert costs.two_level_gather(1e6, 1, 4, LINK, slow) == costs.ring_gather(1e6, 4, slow)
    assert costs.two_level_all_reduce(1e6, 1, 4, LINK, slow) == costs.all_reduce(1e6, 4, slow)


def simulated_pipeline(stages: int, micro_batches: int, forward: float, backward: float) -> float:
    """Simulates 1F1B task by task: stages work in their own order and wait for their neighbours."""
    done: dict[tuple[str, int, int], float] = {}
    clock, position = [0.0] * stages, [0] * stages
    orders = []
    for stage in range(stages):
        warm = min(stages - stage - 1, micro_batches)
        order = [("f", i) for i in range(warm)]
        for i in range(micro_batches - warm):
            order += [("f", warm + i), ("b", i)]
        orders.append(order + [("b", i) for i in range(micro_batches - warm, micro_batches)])
    while any(position[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            if position[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][position[stage]]
            if kind == "f":
                needs = None if stage == 0 else ("f", stage - 1, i)
            else:
                needs = ("f", stage, i) if stage == stages - 1 else ("b", stage + 1, i)
            if needs is not None and needs not in done:
                continue
            start = max(clock[stage], done.get(needs, 0.0) if needs else 0.0)
            clock[stage] = done[kind, stage, i] = start + (forward if kind == "f" else backward)
            position[stage] += 1
    return max(clock)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 4), (4, 4), (4, 16), (3, 1)])
def test_pipeline_matches_step_by_step_simulation(stages: int, micro_batches: int) -> None:
    expected = simulated_pipeline(stages, micro_batches, 1.0, 2.0)
    assert costs.pipelined([1.0] * stages, [2.0] * stages, micro_batches) == pytest.approx(expected)


def test_overlapped_transfers() -> None:
    # ready at 1, 2, 3; the first takes until 5, so the others wait in the queue
    assert costs.overlapped([1, 2, 3], [4, 1, 1]) == 7
    assert costs.overlapped([1, 2, 3], [0.5, 0.5, 0.5]) == 3.5  # only the last one shows


def test_expected_maximum_of_normals() -> None:
    """David & Nagaraja 2003: 1/sqrt(pi), 3/(2 sqrt(pi)); Harter 1961, table 1: from 8 on."""
    printed = {1: 0.0, 2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi), 8: 1.42360, 100: 2.50759, 1000: 3.24144}
    for count, value in printed.items():
        assert costs.expected_maximum(count) == pytest.approx(value, abs=1e-5)


def test_straggler_slowdown_matches_sampling() -> None:
    devices, barriers, variation = 16, 9, 0.05
    draws = np.random.default_rng(0).standard_normal((4000, barriers, devices))
    intervals = 1 / barriers + variation / math.sqrt(barriers) * draws
    assert intervals.sum(1).std() == pytest.approx(variation, rel=0.02)  # of one device's update
    assert costs.slowed(devices, variation, barriers) == pytest.approx(intervals.max(2).sum(1).mean(), rel=0.01)
