"""Metrics of regression: R2 and the mean absolute error."""

from typing import TYPE_CHECKING

from dlopt.metrics.declaration import Declaration, Evaluated, Sum

if TYPE_CHECKING:
    from torch import Tensor


def _columns(values: "Tensor") -> "Tensor":
    """Returns outputs or targets [N, K], or [N] for K = 1, as float64 [N, K]."""
    return values.reshape(len(values), -1).double()


def _sums(part: Evaluated) -> "Tensor":
    """Returns the number of samples, the sum of absolute residuals, and of each column the sums of squared residuals,
    of targets and of squared targets."""
    import torch

    targets = _columns(part.targets)
    residual = _columns(part.outputs) - targets
    if part.origin is not None:  # else rounding may leave constant targets a variance of either sign
        targets = targets - _columns(part.origin).to(targets.device)
    count = residual.new_full((1,), len(targets))
    return torch.cat(
        [count, residual.abs().sum().view(1), residual.square().sum(0), targets.sum(0), targets.square().sum(0)]
    )


SUMS = Sum(lambda outputs: 2 + 3 * outputs, _sums)


def _r2(sums: "Tensor", _: object) -> float:
    residual, total, squares = sums[2:].view(3, -1)
    spread = squares - total.square() / sums[0]
    # Constant targets: as in scikit-learn, 1 for exact predictions, else 0.
    return (1 - residual / spread).where(spread > 0, (residual == 0) + 0 * residual).mean().item()


def _mae(sums: "Tensor", _: object) -> float:
    outputs = (len(sums) - 2) // 3
    return (sums[1] / (sums[0] * outputs)).item()


METRICS = (
    Declaration(
        "r2", "max", "", "1 - squared residuals / variance of the targets, mean over the columns; of constant "
        "targets 0, or 1 if all predictions are exact", "tested", (SUMS,), _r2,
    ),
    Declaration("mae", "min", "", "mean absolute error, mean over the columns", "tested", (SUMS,), _mae),
)  # fmt: skip
