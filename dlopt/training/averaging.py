"""Averages of the weights along the way, which are validated and tested in the weights' place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dlopt.parallel.shards import local


class ExponentialAverage:
    """average <- decay * average + (1 - decay) * weights after every update (Polyak & Juditsky 1992, exponential form).

    Floating-point buffers (batch-norm statistics) are averaged as the weights are; counters are the model's. Of a model
    that is spread over processes each keeps the average of its part.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        # Not by state_dict, in which a tensor that two layers share stands twice.
        tensors = [local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
        self._values = [tensor for tensor in tensors if tensor.is_floating_point() and not tensor.is_meta]
        self._averages = [value.clone() for value in self._values]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._averages, self._values, 1 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Goes on from the model's present weights."""
        torch._foreach_copy_(self._averages, self._values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the average within; the weights are back afterwards, and changes to the average are kept."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        weights = [value.clone() for value in self._values]
        torch._foreach_copy_(self._values, self._averages)
        torch._foreach_copy_(self._averages, weights)


@contextmanager
def at_evaluation_point(optimizer: torch.optim.Optimizer, average: ExponentialAverage | None = None) -> Iterator[None]:
    """The weights are those to evaluate: the `average` where there is one, and schedule-free methods train at another
    point than they are tested at."""
    if average is not None:
        with average.in_place():
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
