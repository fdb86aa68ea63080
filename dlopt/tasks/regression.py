"""Each sample has a value, or several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dlopt.basics.formats import format_count
from dlopt.metrics import regression
from dlopt.metrics.declaration import Declaration, Evaluated
from dlopt.tasks.task import Names, Task

_SHOWN_VALUES = 5  # of a sample, whose means a header shows


@dataclass(frozen=True)
class Regression(Task):
    """Targets: float [B] or [B, K]. `outputs`: the number of values."""

    kind: ClassVar = "regression"
    title: ClassVar = "Regression"
    purpose: ClassVar = "values per target"
    metrics: ClassVar[Sequence[Declaration]] = regression.METRICS

    def describe(self, window: tuple[int, ...], targets: Tensor, classes: Names) -> str:
        described = f"{super().describe(window, targets, classes)}, {format_count('values', self.outputs)}"
        if self.outputs > _SHOWN_VALUES:
            return described
        columns = targets.double().reshape(len(targets), -1)
        both = (columns.mean(0), columns.std(0, correction=0))
        mean, deviation = (", ".join(f"{value:.4g}" for value in each.tolist()) for each in both)
        return f"{described}: mean {mean}, standard deviation {deviation}"

    def beside_guessing(
        self, split: Evaluated, training: Tensor, classes: Names, unit: tuple[float, float] = (1.0, 0.0)
    ) -> str:
        mean = training.cpu().double().flatten(1 if training.ndim > 1 else 0).mean(0)
        targets = split.targets.double().reshape(len(split.targets), -1)
        error = (split.outputs.double().reshape_as(targets) - targets).abs().mean().item()
        change = 100 * (1 - error / (targets - mean).abs().mean().item()) if (targets != mean).any() else math.nan
        if not math.isfinite(change):
            return ""
        scale, offset = unit
        side = "below" if change >= 0 else "above"
        number = f" {offset + scale * mean.item():.4g}" if mean.numel() == 1 else ""
        of_data = "" if scale == 1 else " in the unit of the data"
        of_mean = f"{abs(change):.0f} % {side} that of always predicting the mean{number}"
        return f"mae {scale * error:.4g}{of_data}, {of_mean}"
