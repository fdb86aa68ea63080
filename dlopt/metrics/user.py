"""Computes metrics of the user's own (`evaluate.metrics`), which are functions of all samples of a split."""

import numbers
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from dlopt.basics.errors import RunError
from dlopt.metrics.sums import Reduce
from dlopt.parallel.ranks import Ranks

OwnMetric = Callable[[Tensor, Tensor], Any]
"""(outputs, targets) of all samples of a split, on the CPU -> a number."""


class OwnMetrics:
    """Keeps outputs and targets of an evaluation in main memory, and applies the functions to all of them.

    The functions run in the process of rank 0 only, on the samples of all ranks in the order of the data.
    """

    def __init__(self, functions: Mapping[str, OwnMetric], ranks: Ranks) -> None:
        self._functions, self._ranks = functions, ranks
        self._batches: list[tuple[Tensor, Tensor]] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds this rank's samples of a batch."""
        if self._ranks.counts:  # otherwise another rank has the same samples
            self._batches.append((outputs.detach().cpu(), targets.cpu()))

    def means(self, _: Reduce | None = None) -> dict[str, float]:
        """Returns the metrics by name, on all ranks. Raises `RunError` if a function fails."""
        gathered = self._ranks.gather([self._batches])
        result: dict[str, float] | str = {}
        if self._ranks.is_main:
            # Batch by batch: the ranks hold adjacent slices of each batch, of which the last may leave some without.
            shards = [shard for batch in zip_longest(*gathered) for shard in batch if shard is not None]
            outputs, targets = (torch.cat(column) for column in zip(*shards, strict=True))
            try:
                result = compute(self._functions, outputs, targets)
            except RunError as error:
                if self._ranks.processes == 1:
                    raise  # with the traceback of the function, for train.log
                result = str(error)
        result = self._ranks.broadcast(result)
        if isinstance(result, str):
            raise RunError(result)
        return result


def compute(functions: Mapping[str, OwnMetric], outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Returns the value of each function by name. Raises `RunError` if one raises, or returns no number."""
    outputs, targets = outputs.cpu(), targets.cpu()
    return {name: _value(function, outputs, targets) for name, function in functions.items()}


def _value(function: OwnMetric, outputs: Tensor, targets: Tensor) -> float:
    name = getattr(function, "__name__", type(function).__name__)
    setting = f"evaluate.metrics={function.__module__}.{name}"
    try:
        value = function(outputs, targets)
    except Exception as error:
        raise RunError(f"{setting}: raised {type(error).__name__}: {error}") from error
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's scalars are real numbers
        shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
        raise RunError(f"{setting}: must return a number, not {type(value).__name__}{shape}")
    return float(value)
