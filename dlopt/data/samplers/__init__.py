"""Samplers: the order of the training samples in an epoch, a function of seed, epoch and sampler state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.basics.ranges import Count
from dlopt.data.samplers.classes import ClassBalanced, ClassInterleaved, ClassSorted
from dlopt.data.samplers.diverse import Diverse
from dlopt.data.samplers.hard import HardExamples
from dlopt.data.texts.windows import Windows

BY_SAMPLE = (ClassBalanced, ClassSorted, ClassInterleaved, Diverse, HardExamples)
"""Samplers that order samples by their labels, inputs or losses: not the windows of a text, which have no labels and
change in every epoch."""


@runtime_checkable
class Sampler(Protocol):
    """What training asks of a sampler. Every rank computes its own order, and all orders must be equal."""

    def __len__(self) -> int:
        """Returns the number of indices in an epoch."""
        ...

    def order(self, epoch: int) -> Tensor:
        """Returns the int64 indices of epoch `epoch` (from 0), the same at every call."""
        ...


@runtime_checkable
class LossAwareSampler(Sampler, Protocol):
    """A sampler whose order depends on the samples' losses, and which therefore has a state.

    Protocol: `begin()` once per run of batches, `serve()` for each batch, then `observe()` with its losses.
    """

    maximum: Callable[[Tensor], Tensor]  # elementwise maximum over ranks; each rank observes its own samples only

    def begin(self) -> None:
        """Resets pending batches; losses not yet observed are dropped."""
        ...

    def serve(self, step: int, indices: Tensor) -> None:
        """Registers this rank's samples `indices` [B] of the batch of update `step`."""
        ...

    def observe(self, losses: Tensor) -> None:
        """Records the losses [n] of the next n served samples, in the order of `serve`."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class MeasuredSampler(Sampler, Protocol):
    """A sampler with metrics of the latest epoch, by column, which are logged with those of the training."""

    def metrics(self) -> Mapping[str, float]: ...


def loss_aware(sampler: Sampler) -> LossAwareSampler | None:
    """Returns a sampler whose order depends on losses; raises `UserError` for one without a state."""
    if isinstance(sampler, LossAwareSampler):
        return sampler
    if hasattr(sampler, "observe"):
        raise UserError(
            f"sampler: {type(sampler).__name__} has observe(losses), and must also have maximum, begin(), "
            "serve(step, indices), state_dict() and load_state_dict(state)"
        )
    return None


class Random:
    """Visits every sample once, in a new random order each epoch; or only the first `epoch_size` of that order."""

    def __init__(self, *, targets: Tensor, seed: int, epoch_size: Count | None) -> None:
        self._count = len(targets)
        self._size = self._count if epoch_size is None else min(epoch_size, self._count)
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def order(self, epoch: int) -> Tensor:
        return torch.randperm(self._count, generator=generator("cpu", self._seed, epoch))[: self._size]


class Sequential:
    """Visits every sample once, in the order of the dataset."""

    def __init__(self, *, targets: Tensor) -> None:
        self._count = len(targets)

    def __len__(self) -> int:
        return self._count

    def order(self, epoch: int) -> Tensor:
        return torch.arange(self._count)


class WithReplacement:
    """Draws N of N samples independently: an epoch visits a fraction of about 1 - 1/e of them."""

    def __init__(self, *, targets: Tensor, seed: int) -> None:
        self._count = len(targets)
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def order(self, epoch: int) -> Tensor:
        return torch.randint(self._count, (self._count,), generator=generator("cpu", self._seed, epoch))


@dataclass(frozen=True)
class ShiftedWindows:
    """Orders the windows of a text by a sampler, and shifts all of them by a random number of tokens in each epoch.

    An epoch covers every token about once, each time in other windows. The order consists of the windows' first tokens,
    for `Windows.at_every_token`. A subset of the windows is not shifted.
    """

    sampler: Sampler
    windows: Windows
    seed: int

    def __len__(self) -> int:
        return len(self.sampler)

    def order(self, epoch: int) -> Tensor:
        starts = self.windows.starts(self.sampler.order(epoch))
        if self.windows.rows is not None:
            return starts
        length = self.windows.length
        shift = int(torch.randint(length, (), generator=generator("cpu", self.seed, epoch, length)))
        return (starts + shift).clamp(max=len(self.windows.tokens) - length - 1)


def shifted(sampler: Sampler, windows: Windows, seed: int) -> tuple[Sampler, Windows]:
    """Returns the order and the samples of training on a text."""
    return ShiftedWindows(sampler, windows, seed), windows.at_every_token()
