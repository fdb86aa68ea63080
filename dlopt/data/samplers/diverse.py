"""Batches that are each a small picture of the whole training set."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dlopt.data.loading import chunks
from dlopt.data.samples import Samples
from dlopt.random import generator
from dlopt.ranges import Count

_SIDE = 8  # pixels to which images are averaged before they are compared
_FITTED = 10_000  # samples on which the centres are fitted
_ITERATIONS = 25


class Diverse:
    """Every sample once, in batches stratified over classes and, within each class, over clusters of similar inputs.

    All full batches have the same number of samples of each class and of each cluster of a class, give or take one;
    the last, smaller one has its share of them. Clusters: k-means on averaged pixels, or on standardized features of
    vectors, read once. In a regression there are clusters only.
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
        if self._features is None:  # not before an epoch is asked for: it reads all inputs
            self._features = input_features(self._samples)
            self._assigned = k_means(self._features, self._clusters, generator("cpu", self._seed))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._deal(generator("cpu", self._seed, epoch))
        return self._order[1]

    def _deal(self, draws: torch.Generator) -> Tensor:
        """Deals the samples, sorted by class and cluster, to the batches like cards."""
        count, size = len(self), self._batch_size
        order = torch.randperm(count, generator=draws)
        strata = _shuffled(self._labels, draws)[order] * (self._clusters + 1) + _shuffled(self._assigned, draws)[order]
        order = order[strata.argsort(stable=True)]
        full, rest = divmod(count, size)
        last = torch.zeros(count, dtype=torch.bool)
        if rest:  # evenly spaced cards
            start = float(torch.rand((), generator=draws, dtype=torch.float64))
            cards = (torch.arange(rest, dtype=torch.float64) + start) * (count / rest)
            last[cards.long().clamp_max(count - 1)] = True
        hands = order[~last].view(size, full).T[torch.randperm(full, generator=draws)]
        hands = hands.gather(1, torch.rand(full, size, generator=draws).argsort(1))
        end = order[last]
        return torch.cat([hands.flatten(), end[torch.randperm(rest, generator=draws)]])

    def metrics(self) -> dict[str, float]:
        """batch_variation: the variance of the inputs within batches over that of the whole training set.

        Sample-weighted mean over the batches of the latest epoch; its expectation in a random order is 1.
        """
        if self._order is None or self._features is None:
            return {}
        return {"batch_variation": batch_variation(self._features, self._order[1], self._batch_size)}


def _shuffled(codes: Tensor, draws: torch.Generator) -> Tensor:
    """The same classes under other, random numbers."""
    return torch.randperm(int(codes.max()) + 1, generator=draws)[codes]


def batch_variation(features: Tensor, order: Tensor, batch_size: int) -> float:
    """Total variance of `features` [N, F] (about 0) within batches, over that of all; 1 where nothing varies."""
    batches = [features[part].double() for part in order.split(batch_size) if len(part) > 1]
    whole = float(features.double().var(0).sum()) if len(features) > 1 else 0.0
    if not batches or whole == 0.0:
        return 1.0
    within = sum(len(batch) * float(batch.var(0).sum()) for batch in batches)
    return within / sum(map(len, batches)) / whole


def input_features(samples: Samples) -> Tensor:
    """float32 [N, F], of mean 0: images averaged to 8 x 8 pixels at most, vectors at unit variance per feature."""
    found = []
    for chunk in chunks(samples):
        inputs = chunk.float()
        if inputs.ndim == 4:
            inputs = F.adaptive_avg_pool2d(inputs, (min(_SIDE, inputs.shape[2]), min(_SIDE, inputs.shape[3])))
        found.append(inputs.flatten(1))
    features = torch.cat(found)
    features -= features.mean(0)
    if len(samples.shape) != 3:
        deviation = features.square().mean(0).sqrt()
        features /= torch.where(deviation > 0, deviation, 1.0)
    return features


def k_means(features: Tensor, clusters: int, draws: torch.Generator) -> Tensor:
    """Cluster 0..clusters-1 of each row of `features` [N, F]: Lloyd's algorithm from the seeds of k-means++.

    The centres are fitted on at most 10,000 evenly spaced rows. In float64, so that the rounding of one machine or
    another does not decide. (Arthur & Vassilvitskii 2007)
    """
    count = len(features)
    fitted = features[torch.linspace(0, count - 1, min(count, _FITTED)).long()].double()
    centres = fitted[torch.randint(len(fitted), (1,), generator=draws)]
    nearest = torch.full((len(fitted),), torch.inf, dtype=torch.float64)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, (fitted - centres[-1]).square().sum(1))
        if not nearest.any():
            break  # no more different rows
        centres = torch.cat([centres, fitted[torch.multinomial(nearest, 1, generator=draws)]])
    for _ in range(_ITERATIONS):
        member = F.one_hot(_closest(fitted, centres), len(centres)).double()
        sizes = member.sum(0).unsqueeze(1)
        moved = torch.where(sizes > 0, member.T @ fitted / sizes.clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return torch.cat([_closest(part.double(), centres) for part in features.split(_FITTED)])


def _closest(rows: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(1) - 2 * rows @ centres.T).argmin(1)
