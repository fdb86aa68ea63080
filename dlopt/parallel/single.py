"""One process on one device; and, written out once, what the run asks of every mode."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Single:
    """What the run asks of every mode.

    The engine sees a mode only where there are several processes: `dlopt.engine.shared` has the step of a rank.
    """

    rank = 0
    processes = 1
    local_processes = 1  # on this machine: they share its cores
    is_main = True  # this process writes and prints
    share: Callable[[int], slice | Tensor] | None = None  # own samples of a training batch; None: all
    share_evaluation: Callable[[int], slice] | None = None  # own samples of an evaluation batch; None: all
    norm_shares = 1  # parts into which a batch falls for a batch norm

    def __init__(self, device: torch.device, name: str = "single") -> None:
        self.device = device
        self.name = name

    def augmented(self, augment: Any) -> Any:
        """The augmentation as it is applied to this rank's samples."""
        return augment

    def batches(self, batches: Any) -> Any:
        """The training batches as the loop iterates them."""
        return batches

    def place(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The model as the step calls it. Layers within `model` may be replaced by distributed ones; names stay."""
        return model

    def agree(self, interruption: T) -> T:
        """An interruption that all ranks see after the same update."""
        return interruption

    def polled(self, interruption: T) -> T:
        """The same within an evaluation, where all ranks ask equally often."""
        return interruption

    def align(self, *models: nn.Module) -> None:
        """Before weights are looked at or saved: what is not kept equal on all ranks by itself becomes equal."""

    def total(self, values: Sequence[float]) -> Sequence[float]:
        """Sums over ranks."""
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        return value
