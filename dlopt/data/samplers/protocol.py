"""What the batches and the engine ask of a sampler."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class Sampler(Protocol):
    def __len__(self) -> int:
        """Indices in an epoch."""
        ...

    def order(self, epoch: int) -> Tensor:
        """int64 indices of epoch `epoch` (from 0), the same at every call."""
        ...


@runtime_checkable
class Attentive(Sampler, Protocol):
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
