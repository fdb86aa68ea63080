"""Computes metrics of the user's own (`evaluate.metrics`), which are functions of all samples of a split."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dlopt.basics.errors import RunError
from dlopt.metrics.outputs import KeptOutputs, Ranks
from dlopt.metrics.sums import Reduce

UserMetric = Callable[[Tensor, Tensor], Any]
"""(outputs, targets) of all samples of a split, on the CPU -> a number."""


class UserMetrics(KeptOutputs):
    """Keeps outputs and targets of an evaluation in main memory, and applies the functions to all of them.

    The functions run in the process of rank 0 only, on the samples of all ranks in the order of the data.
    """

    def __init__(self, functions: Mapping[str, UserMetric], ranks: Ranks) -> None:
        super().__init__(ranks)
        self._functions = functions

    def means(self, _: Reduce | None = None) -> dict[str, float]:
        """Returns the metrics by name, on all ranks. Raises `RunError` if a function fails."""
        samples = self.gathered()
        result: dict[str, float] | str = {}
        if samples is not None:
            try:
                result = compute(self._functions, *samples)
            except RunError as error:
                if self._ranks.processes == 1:
                    raise  # with the traceback of the function, for train.log
                result = str(error)
        # All ranks need the metrics. An error is sent, too: they would otherwise wait for rank 0 in the next
        # collective.
        result = self._ranks.broadcast(result)
        if isinstance(result, str):
            raise RunError(result)
        return result


def compute(functions: Mapping[str, UserMetric], outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Returns the value of each function by name. Raises `RunError` if one raises, or returns no number."""
    outputs, targets = outputs.cpu(), targets.cpu()
    return {name: _value(function, outputs, targets) for name, function in functions.items()}


def _value(function: UserMetric, outputs: Tensor, targets: Tensor) -> float:
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
