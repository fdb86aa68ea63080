"""The order in which an epoch visits the training samples: a function of the seed, of the epoch, and of a state."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dlopt.data.samplers.classes import ClassBalanced, ClassInterleaved, ClassSorted
from dlopt.data.samplers.diverse import Diverse
from dlopt.data.samplers.hard import HardExamples
from dlopt.random import generator

__all__ = [
    "ClassBalanced",
    "ClassInterleaved",
    "ClassSorted",
    "Diverse",
    "HardExamples",
    "LossAwareSampler",
    "Random",
    "Sampler",
    "Sequential",
    "WithReplacement",
]


class Sampler(Protocol):
    def __len__(self) -> int:
        """Indices in an epoch."""
        ...

    def order(self, epoch: int) -> Tensor:
        """int64 indices of epoch `epoch` (from 0), the same at every call."""
        ...


@runtime_checkable
class LossAwareSampler(Sampler, Protocol):
    """A sampler that looks at the losses of the samples, and so has a state."""

    maximum: Callable[[Tensor], Tensor]  # elementwise, over ranks, each of which sees its own samples' losses

    def begin(self) -> None:
        """Batches are served anew: what was served before and not observed will not be."""
        ...

    def serve(self, step: int, indices: Tensor) -> None:
        """The batch of update `step` is given out: this rank's samples `indices` [B]."""
        ...

    def observe(self, losses: Tensor) -> None:
        """Losses [n] of the next n samples that were served, in the order in which they were."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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
