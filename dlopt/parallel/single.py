"""One process on one device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Single:
    """What the run asks of every mode: rank and size, where the model goes, which part of a batch is this rank's."""

    name = "single"
    rank = 0
    processes = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def place(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The model as the step calls it."""
        return model
