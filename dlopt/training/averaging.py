"""Exponential moving average (EMA) of the weights, used for validation and test."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dlopt.parallel.shards import local


class ExponentialAverage:
    """average <- decay * average + (1 - decay) * weights after every update (Polyak & Juditsky 1992, exponential form).

    Floating-point buffers (batch-norm statistics) are averaged as well; counters are not. A process averages its
    shards of a sharded model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        # Not from state_dict, which contains a tensor shared by two layers twice.
        tensors = [local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
        self._values = [t for t in tensors if (t.is_floating_point() or t.is_complex()) and not t.is_meta]
        self._averages = [value.clone() for value in self._values]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._averages, self._values, 1 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the present weights."""
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
        weights = [value.clone() for value in self._values]
        torch._foreach_copy_(self._values, self._averages)
        torch._foreach_copy_(self._averages, weights)


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer, average: ExponentialAverage | None = None) -> Iterator[None]:
    """Context in which the model holds the weights to evaluate: the average, or those of a schedule-free optimizer."""
    if average is not None:
        with average.swapped_in():
            yield
        return
    if not (hasattr(optimizer, "eval") and hasattr(optimizer, "train")):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
