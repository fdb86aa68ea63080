"""One process on one device; and, written out once, what the run asks of every mode."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Whole:
    """States and norms where every process has the whole model; `dlopt.parallel.shards.Cut` is the other case."""

    splits: Literal["nothing", "tensors", "layers"] = "nothing"  # what the processes divide among them
    compiles = True  # the model can be compiled as a whole

    @staticmethod
    def gathered(state: T) -> T:
        """The state of a model or an optimizer with whole tensors, as one process has it; needed on the main one."""
        return state

    @staticmethod
    def load_model(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Loads what `gathered` gives, which all ranks have; each takes its part."""
        model.load_state_dict(state, strict=strict)

    @staticmethod
    def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        optimizer.load_state_dict(dict(state))

    @staticmethod
    def norm(tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm of the model's tensors, or of as many gradients, taken as one vector; a plain scalar."""
        return torch.nn.utils.get_total_norm(tensors)


class Single(Whole):
    """What the run asks of every mode.

    The engine sees a mode only where there are several processes: `dlopt.train.step` has the step of a rank.
    """

    rank = 0
    processes = 1
    local_processes = 1  # on this machine: they share its cores
    is_main = True  # this process writes and prints
    share: Callable[[int], slice | Tensor] | None = None  # own samples of a training batch; None: all
    share_evaluation: Callable[[int], slice] | None = None  # own samples of an evaluation batch; None: all
    norm_shares = 1  # parts into which a batch falls for a batch norm
    notes: tuple[str, ...] = ()  # what the user should know of how the model was placed
    in_flight = 1  # micro-batches into which the mode itself cuts a batch

    def __init__(self, device: torch.device, name: str = "single") -> None:
        self.device = device
        self.name = name

    def augmented(self, augment: Any) -> Any:
        """The augmentation as it is applied to this rank's samples."""
        return augment

    def batches(self, batches: Any) -> Any:
        """The training batches as the loop iterates them."""
        return batches

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        """The model as it is called, on samples of `input_shape`.

        Layers within `model` may be replaced by distributed ones; the names of parameters and buffers stay. Parameters
        may become DTensors (all of them: optimizers do not mix), or go to the meta device where another rank has them.
        """
        return model

    def agree(self, interruption: T) -> T:
        """An interruption that all ranks see after the same update."""
        return interruption

    def polled(self, interruption: T) -> T:
        """The same within an evaluation, where all ranks ask equally often."""
        return interruption

    def aligning(self, model: nn.Module) -> Callable[[], None] | None:
        """What makes equal on all ranks, after every update, what the update does not by itself; or None."""
        return None

    def total(self, values: Sequence[float]) -> Sequence[float]:
        """Sums over ranks, what several of them see counted once."""
        return values

    def everyones(self, values: list[T]) -> list[T]:
        """The lists of all ranks as one."""
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        return value
