"""Stratified batches: each represents the whole training set."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dlopt.basics.random import generator
from dlopt.basics.ranges import Count
from dlopt.data.loading import chunks
from dlopt.data.samples import Samples

_SIDE = 8  # pixels; images are downsampled to this size for the clustering
_FIT_SAMPLES = 10_000  # for fitting the centres
_ITERATIONS = 25


class Diverse:
    """Visits every sample once, in batches stratified by class and, within each class, by clusters of similar inputs.

    The number of samples of each class, and of each cluster of a class, differs by at most one between full batches; a
    smaller last batch has proportionally fewer. Clusters: k-means on downsampled pixels, or on standardized features of
    vectors, computed once. Regression uses the clusters only.
    """

    def __init__(
        self, *, targets: Tensor, samples: Samples, batch_size: int | Literal["full"], seed: int, clusters: Count
    ) -> None:
        self._samples = samples
        count = len(targets)
        self._batch_size = count if batch_size == "full" else min(batch_size, count)
        regression = targets.is_floating_point()
        self._labels = torch.zeros(count, dtype=torch.int64) if regression else targets.cpu()
        self._seed = seed
        self._clusters = clusters
        self._features: Tensor | None = None
        self._assigned = torch.zeros(0, dtype=torch.int64)
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._labels)

    def order(self, epoch: int) -> Tensor:
        if self._features is None:  # computed lazily, because it reads all inputs
            self._features = input_features(self._samples)
            self._assigned = k_means(self._features, self._clusters, generator("cpu", self._seed))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._stratified_order(generator("cpu", self._seed, epoch))
        return self._order[1]

    def _stratified_order(self, rng: torch.Generator) -> Tensor:
        """Sorts the samples by class and cluster and assigns them to the batches in turn."""
        count, size = len(self), self._batch_size
        order = torch.randperm(count, generator=rng)
        strata = _permuted(self._labels, rng)[order] * (self._clusters + 1) + _permuted(self._assigned, rng)[order]
        order = order[strata.argsort(stable=True)]
        full, rest = divmod(count, size)
        is_last = torch.zeros(count, dtype=torch.bool)
        if rest:  # the smaller last batch takes evenly spaced samples
            start = float(torch.rand((), generator=rng, dtype=torch.float64))
            positions = (torch.arange(rest, dtype=torch.float64) + start) * (count / rest)
            is_last[positions.long().clamp_max(count - 1)] = True
        batches = order[~is_last].view(size, full).T[torch.randperm(full, generator=rng)]
        batches = batches.gather(1, torch.rand(full, size, generator=rng).argsort(1))
        last = order[is_last]
        return torch.cat([batches.flatten(), last[torch.randperm(rest, generator=rng)]])

    def metrics(self) -> dict[str, float]:
        """Returns batch_variation: input variance within batches, relative to the training set.

        Sample-weighted mean over the batches of the latest epoch; 1 in expectation for a random order.
        """
        if self._order is None or self._features is None:
            return {}
        return {"batch_variation": batch_variation(self._features, self._order[1], self._batch_size)}


def _permuted(labels: Tensor, rng: torch.Generator) -> Tensor:
    """Renames the labels by a random permutation."""
    return torch.randperm(int(labels.max()) + 1, generator=rng)[labels]


def batch_variation(features: Tensor, order: Tensor, batch_size: int) -> float:
    """Returns the variance of `features` [N, F] (mean 0) within batches over the total variance; 1 if that is 0."""
    batches = [features[indices].double() for indices in order.split(batch_size) if len(indices) > 1]
    total = float(features.double().var(0).sum()) if len(features) > 1 else 0.0
    if not batches or total == 0.0:
        return 1.0
    within = sum(len(batch) * float(batch.var(0).sum()) for batch in batches)
    return within / sum(map(len, batches)) / total


def input_features(samples: Samples) -> Tensor:
    """Returns float32 [N, F] of mean 0: images downsampled to at most 8 x 8 pixels, vectors with unit variance."""
    blocks = []
    for chunk in chunks(samples):
        inputs = chunk.float()
        if inputs.ndim == 4:
            inputs = F.adaptive_avg_pool2d(inputs, (min(_SIDE, inputs.shape[2]), min(_SIDE, inputs.shape[3])))
        blocks.append(inputs.flatten(1))
    features = torch.cat(blocks)
    features -= features.mean(0)
    if len(samples.shape) != 3:
        deviation = features.square().mean(0).sqrt()
        features /= torch.where(deviation > 0, deviation, 1.0)
    return features


def k_means(features: Tensor, clusters: int, rng: torch.Generator) -> Tensor:
    """Returns the cluster 0..clusters-1 of each row of `features` [N, F], by Lloyd's algorithm with k-means++ seeding.

    Fits the centres on at most 10,000 evenly spaced rows, in float64, so that rounding differences between machines do
    not change the clusters (Arthur & Vassilvitskii 2007).
    """
    count = len(features)
    rows = features[torch.linspace(0, count - 1, min(count, _FIT_SAMPLES)).long()].double()
    centres = rows[torch.randint(len(rows), (1,), generator=rng)]
    distances = torch.full((len(rows),), torch.inf, dtype=torch.float64)  # squared, to the nearest centre
    for _ in range(clusters - 1):
        distances = torch.minimum(distances, (rows - centres[-1]).square().sum(1))
        if not distances.any():
            break  # fewer distinct rows than clusters
        centres = torch.cat([centres, rows[torch.multinomial(distances, 1, generator=rng)]])
    for _ in range(_ITERATIONS):
        membership = F.one_hot(_closest(rows, centres), len(centres)).double()
        sizes = membership.sum(0).unsqueeze(1)
        updated = torch.where(sizes > 0, membership.T @ rows / sizes.clamp_min(1), centres)
        if torch.equal(updated, centres):
            break
        centres = updated
    return torch.cat([_closest(block.double(), centres) for block in features.split(_FIT_SAMPLES)])


def _closest(rows: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(1) - 2 * rows @ centres.T).argmin(1)
