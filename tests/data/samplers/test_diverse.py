"""Stratified batches, their clusters, and the logged batch variation."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

from dlopt.basics.random import generator
from dlopt.data.samplers import Diverse, Random
from dlopt.data.samplers.diverse import batch_variation, input_features, k_means
from dlopt.data.samples import InMemory


def blobs(count: int, centres: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns vectors [count, 4] around `centres` distant points, and the point of each vector."""
    draws = torch.Generator().manual_seed(seed)
    own = torch.randint(centres, (count,), generator=draws)
    points = 10 * torch.randn(centres, 4, generator=draws)
    return points[own] + 0.1 * torch.randn(count, 4, generator=draws), own


def sampler(inputs: Tensor, targets: Tensor, batch_size: int | Literal["full"], **changed: Any) -> Diverse:
    samples = InMemory(inputs, targets)
    return Diverse(targets=targets, samples=samples, batch_size=batch_size, **{"seed": 0, "clusters": 4} | changed)


def spread(counts: list[int]) -> int:
    return max(counts) - min(counts)


@given(
    count=st.integers(1, 200),
    size=st.integers(1, 60),
    classes=st.integers(1, 5),
    clusters=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_batches_are_stratified(count: int, size: int, classes: int, clusters: int, seed: int) -> None:
    inputs, _ = blobs(count, 5, seed)
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    diverse = sampler(inputs, labels, size, seed=seed, clusters=clusters)
    order = diverse.order(seed)
    assert sorted(order.tolist()) == list(range(count))
    assigned = k_means(input_features(InMemory(inputs, labels)), clusters, generator("cpu", seed))
    assert torch.equal(assigned, diverse._assigned)
    for strata in (labels, labels * clusters + assigned):
        for stratum in strata.unique().tolist():
            counts = [int((strata[batch] == stratum).sum()) for batch in order.split(size)]
            full = counts[: count // size] or counts
            assert spread(full) <= 1
            if count % size:
                assert abs(counts[-1] - (count % size) * sum(counts) / count) < 1


def test_batches_vary_more_than_random_ones() -> None:
    inputs, own = blobs(400, 4)
    diverse = sampler(inputs, own % 2, 8)
    assert diverse.metrics() == {}
    order = diverse.order(0)
    features = input_features(InMemory(inputs, own))
    ((name, variation),) = diverse.metrics().items()
    random = Random(targets=own, seed=0, epoch_size=None)
    chance = [batch_variation(features, random.order(epoch), 8) for epoch in range(30)]
    assert name == "batch_variation" and variation == batch_variation(features, order, 8)
    assert abs(np.mean(chance) - 1) < 0.02  # unbiased
    assert variation > max(chance) and variation > 1.05
    assert batch_variation(features, own.argsort(), 8) < 0.2  # batches of one kind


def test_variation_matches_numpy() -> None:
    inputs, _ = blobs(21, 3)
    features, order = inputs.numpy().astype(np.float64), np.random.default_rng(0).permutation(21)
    parts = [features[order[start : start + 4]] for start in range(0, 20, 4)]  # the last batch has one sample
    within = np.mean([part.var(0, ddof=1).sum() for part in parts])
    expected = within / features.var(0, ddof=1).sum()
    assert batch_variation(inputs, torch.from_numpy(order), 4) == pytest.approx(expected, rel=1e-6)
    assert batch_variation(torch.zeros(5, 2), torch.arange(5), 2) == 1.0
    assert batch_variation(torch.zeros(1, 2), torch.arange(1), 2) == 1.0


def test_full_batch_and_regression() -> None:
    inputs, own = blobs(30, 3)
    assert sorted(sampler(inputs, own, "full").order(0).tolist()) == list(range(30))
    order = sampler(inputs, torch.rand(30, 2), 10, clusters=3).order(0)
    for kind in range(3):
        assert spread([int((own[batch] == kind).sum()) for batch in order.split(10)]) <= 1


@pytest.mark.parametrize("clusters", [1, 2, 5, 8])
def test_k_means_matches_scikit_learn(clusters: int) -> None:
    rows = torch.randn(300, 3, generator=torch.Generator().manual_seed(1))

    def inertia(assigned: np.ndarray) -> float:
        parts = [rows.numpy()[assigned == c] for c in range(clusters)]
        return float(sum(((part - part.mean(0)) ** 2).sum() for part in parts))

    ours = inertia(k_means(rows, clusters, generator("cpu", 0)).numpy())
    single = [inertia(KMeans(clusters, n_init=1, random_state=seed).fit(rows.numpy()).labels_) for seed in range(10)]
    assert min(single) * 0.999 <= ours <= max(single) * 1.05


def test_k_means_finds_blobs_and_accepts_fewer_rows_than_clusters() -> None:
    rows, own = blobs(200, 3, seed=2)
    found = k_means(rows, 3, generator("cpu", 0))
    assert len({(int(a), int(b)) for a, b in zip(found, own, strict=True)}) == 3
    assert k_means(torch.ones(6, 2), 4, generator("cpu", 0)).tolist() == [0] * 6
    assert len(k_means(rows[:2], 7, generator("cpu", 0)).unique()) == 2


def test_features() -> None:
    images = torch.randint(256, (5, 3, 16, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    features = input_features(InMemory(images, torch.zeros(5, dtype=torch.int64)))
    means = images.float().view(5, 3, 8, 2, 6).mean(3).flatten(1)
    assert features.shape == (5, 3 * 8 * 6)
    torch.testing.assert_close(features, means - means.mean(0))
    vectors = torch.tensor([[1.0, 5.0, 1000.0], [1.0, 7.0, 3000.0]])
    features = input_features(InMemory(vectors, torch.zeros(2, dtype=torch.int64)))
    torch.testing.assert_close(features, torch.tensor([[0.0, -1.0, -1.0], [0.0, 1.0, 1.0]]))
