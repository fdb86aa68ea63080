"""Averages of the weights along the way, which are validated and tested in the weights' place."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ExponentialAverage:
    """average <- decay * average + (1 - decay) * weights after every update (Polyak & Juditsky 1992, exponential form).

    Floating-point buffers (batch-norm statistics) are averaged as the weights are; counters are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        # Not by state_dict, in which a tensor that two layers share stands twice.
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        self._averages = [average for average, value in pairs if value.is_floating_point()]
        self._values = [value for _, value in pairs if value.is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[1].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._averages, self._values, 1 - self.decay)
        for average, value in self._copied:
            average.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def at_evaluation_point(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The weights are those to evaluate: schedule-free methods train at another point than they are tested at."""
    if not (hasattr(optimizer, "eval") and hasattr(optimizer, "train")):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
