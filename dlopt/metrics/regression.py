"""Metrics of regression as functions of sums: R2 and the mean absolute error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dlopt.metrics.sums import Reduce


def _columns(values: Tensor) -> Tensor:
    """Returns outputs or targets [N, K], or [N] for K = 1, as float64 [N, K]."""
    return values.reshape(len(values), -1).double()


class RegressionMetrics:
    """Accumulates r2 (-inf for constant targets) and mae of a regression, averaged over its columns.

    `origin`: one of the targets [1, K], the same on all ranks. The variance is computed from the distances to it:
    without it, rounding may leave constant targets a variance of either sign.
    """

    def __init__(self, names: Sequence[str], outputs: int, origin: Tensor | None = None) -> None:
        self.names = names
        self._outputs = outputs
        self._origin = torch.zeros(1, outputs, dtype=torch.float64) if origin is None else _columns(origin).cpu()
        self._sums = torch.zeros(2 + 3 * outputs, dtype=torch.float64)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds outputs and targets, each [N, K] or [N]."""
        targets = _columns(targets)
        residual = _columns(outputs) - targets
        targets = targets - self._origin.to(targets.device)
        count = residual.new_full((1,), len(outputs))
        self._sums = self._sums.to(residual.device) + torch.cat(
            [count, residual.abs().sum().view(1), residual.square().sum(0), targets.sum(0), targets.square().sum(0)]
        )

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """See `ClassMetrics.means`."""
        local = self._sums.tolist()
        count, absolute, *rest = local if reduce is None else reduce(local)
        residual, total, squares = torch.tensor(rest, dtype=torch.float64).view(3, self._outputs)
        values = {
            "r2": (1 - residual / (squares - total.square() / count)).mean().item(),
            "mae": absolute / (count * self._outputs),
        }
        return {name: values[name] for name in self.names}
