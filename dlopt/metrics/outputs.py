"""Collects the outputs of an evaluation, for metrics that are no sums over samples."""

from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """The processes of a run, as `dlopt.parallel.ranks.Ranks` has them."""

    @property
    def processes(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    @property
    def is_counted(self) -> bool: ...

    def gather(self, values: list[Any]) -> list[Any]: ...

    def broadcast(self, value: Any) -> Any: ...


class KeptOutputs:
    """Outputs and targets of an evaluation in main memory."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._batches: list[tuple[Tensor, Tensor]] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds this rank's samples of a batch."""
        if self._ranks.is_counted:  # otherwise another rank has the same samples
            # The host waits for the device at each batch: the outputs of a whole split may not fit on a GPU.
            self._batches.append((outputs.detach().cpu(), targets.cpu()))

    def gathered(self) -> tuple[Tensor, Tensor] | None:
        """Returns the samples of all ranks in the order of the data; None on ranks > 0. All ranks call this."""
        gathered = self._ranks.gather([self._batches])
        if not self._ranks.is_main:
            return None
        # Batch by batch: the ranks hold adjacent slices of each batch; some ranks may have none of the last batch.
        shards = [shard for batch in zip_longest(*gathered) for shard in batch if shard is not None]
        outputs, targets = (torch.cat(column) for column in zip(*shards, strict=True))
        return outputs, targets
