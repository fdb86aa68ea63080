"""Samplers that look at nothing but the number of samples."""

import torch
from torch import Tensor

from dlopt.random import generator


class Random:
    """Every sample once, in an order drawn afresh for each epoch."""

    def __init__(self, *, targets: Tensor, seed: int) -> None:
        self._count = len(targets)
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def order(self, epoch: int) -> Tensor:
        return torch.randperm(self._count, generator=generator("cpu", self._seed, epoch))


class Sequential:
    """Every sample once, in the order of the dataset."""

    def __init__(self, *, targets: Tensor) -> None:
        self._count = len(targets)

    def __len__(self) -> int:
        return self._count

    def order(self, epoch: int) -> Tensor:
        return torch.arange(self._count)


class WithReplacement:
    """As many independent draws as there are samples: an epoch sees a share of about 1 - 1/e of them."""

    def __init__(self, *, targets: Tensor, seed: int) -> None:
        self._count = len(targets)
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def order(self, epoch: int) -> Tensor:
        return torch.randint(self._count, (self._count,), generator=generator("cpu", self._seed, epoch))
