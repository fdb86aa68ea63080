"""Averages of the weights, used for validation and test: exponential (EMA), and of the last quarter of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dlopt.optim.traits import is_schedule_free
from dlopt.parallel.shards import local


class WeightAverage:
    """average <- (1 - w_n) * average + w_n * weights after update n.

    Floating-point buffers (batch-norm statistics) are averaged as well; counters are not. A process averages its
    shards of a sharded model.
    """

    is_steady = False  # w_n is the same for all updates, so that a CUDA graph can capture it
    first = 1  # the first update after which the average differs from the weights

    def __init__(self, model: nn.Module) -> None:
        self.updates = 0
        # Not from state_dict, which contains a tensor shared by two layers twice.
        tensors = [local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
        self._values = [t for t in tensors if (t.is_floating_point() or t.is_complex()) and not t.is_meta]
        self._averages = [value.clone() for value in self._values]

    def _weight(self, update: int) -> float:
        """Returns w_n of update n = 1, 2, ..."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        torch._foreach_lerp_(self._averages, self._values, self._weight(self.updates))

    @torch.no_grad()
    def restart(self, updates: int = 0) -> None:
        """Sets the average to the present weights, and the number of its updates."""
        self.updates = updates
        torch._foreach_copy_(self._averages, self._values)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context in which the model holds the average; changes to it (exact batch-norm statistics) are kept."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # Swaps the values, not the tensors: the optimizer, a compiled model and a CUDA graph hold references to the
        # tensors.
        weights = [value.clone() for value in self._values]
        torch._foreach_copy_(self._values, self._averages)
        torch._foreach_copy_(self._averages, weights)


class ExponentialAverage(WeightAverage):
    """w_n = 1 - decay (Polyak & Juditsky 1992, exponential form).

    `warmup`: the decay of the nth update is min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    `tf.train.ExponentialMovingAverage` and in torch_ema. The average then covers about the last tenth of the updates;
    a constant decay of 0.999 leaves the random initial weights a share of 66 % after 420 updates.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        super().__init__(model)
        self.decay, self.warmup, self.is_steady = decay, warmup, not warmup

    def _weight(self, update: int) -> float:
        weight = 1 - self.decay
        return max(weight, 9 / (10 + update)) if self.warmup else weight  # 1 - (1 + n) / (10 + n)


class TailAverage(WeightAverage):
    """The mean of the weights over the last quarter of `updates`; until then, the current weights.

    Izmailov et al. 2018, "Averaging weights leads to wider optima" (SWA), start at 75 % of the budget and average once
    per epoch. LAWA (Kaddour 2022) averages over a sliding window, for which it keeps copies of weights.
    """

    def __init__(self, model: nn.Module, updates: int) -> None:
        super().__init__(model)
        self._start = updates - max(updates // 4, 1)
        self.first = self._start + 2  # of the mean of two

    def _weight(self, update: int) -> float:
        return 1 / max(update - self._start, 1)


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer, average: WeightAverage | None = None) -> Iterator[None]:
    """Context in which the model holds the weights to evaluate: the average, or a schedule-free optimizer's weights."""
    if average is not None:
        with average.swapped_in():
            yield
        return
    if not is_schedule_free(type(optimizer)):
        yield
        return
    switching: Any = optimizer
    switching.eval()
    try:
        yield
    finally:
        switching.train()
