"""The order in which an epoch visits the training samples: a function of the seed and of the epoch."""

from typing import Protocol

import torch
from torch import Tensor

from dlopt.random import generator


class Sampler(Protocol):
    def __len__(self) -> int:
        """Indices in an epoch."""
        ...

    def order(self, epoch: int) -> Tensor:
        """int64 indices of epoch `epoch` (from 0), the same at every call."""
        ...


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
