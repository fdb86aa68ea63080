"""Metrics of regression: R2, and the mean and quantiles of the errors."""

import math
from typing import TYPE_CHECKING

from dlopt.metrics.declaration import Declaration, Evaluated, Sum, Whole

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


def _sorted_errors(part: Evaluated) -> "Tensor":
    return (_columns(part.outputs) - _columns(part.targets)).sort(0).values


def quantile(ordered: "Tensor", fraction: float) -> float:
    """Returns the quantile of each column of sorted values [N, K], mean over the columns; NaN if a value is NaN.

    Interpolates linearly between the neighbours, as NumPy does.
    """
    position = fraction * (len(ordered) - 1)
    below = int(position)
    lower, upper = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    values = lower + (position - below) * (upper - lower)
    return values.masked_fill(ordered[-1].isnan(), math.nan).mean().item()  # NaN is sorted to the end


ERRORS = Whole(_sorted_errors)
DISTANCES = Whole(lambda part: ERRORS.on(part).abs().sort(0).values)

METRICS = (
    Declaration(
        "r2", "max", "", "1 - squared residuals / variance of the targets, mean over the columns; of constant "
        "targets 0, or 1 if all predictions are exact", "tested", (SUMS,), _r2,
    ),
    Declaration("mae", "min", "", "mean absolute error, mean over the columns", "tested", (SUMS,), _mae),
    Declaration(
        "median_absolute_error", "min", "", "half of the predictions are within it, mean over the columns", "tested",
        (DISTANCES,), lambda ordered, _: quantile(ordered, 0.5),
    ),
    Declaration(
        "absolute_error_p90", "min", "", "90 % of the predictions are within it, mean over the columns", "tested",
        (DISTANCES,), lambda ordered, _: quantile(ordered, 0.9),
    ),
    Declaration(
        "error_p05", "max", "", "5 % quantile of prediction - target: 5 % of the predictions are too small by more, "
        "mean over the columns", "tested", (ERRORS,), lambda ordered, _: quantile(ordered, 0.05),
    ),
    Declaration(
        "error_p95", "min", "", "95 % quantile of prediction - target: 5 % of the predictions are too large by more, "
        "mean over the columns", "tested", (ERRORS,), lambda ordered, _: quantile(ordered, 0.95),
    ),
)  # fmt: skip
