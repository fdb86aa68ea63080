"""Each sample has one class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlopt.basics.formats import format_shares
from dlopt.metrics import classes as class_metrics
from dlopt.metrics.classes import confusion_matrix
from dlopt.metrics.declaration import Declaration, Evaluated
from dlopt.tasks.report import TestReport
from dlopt.tasks.task import Names, OfClasses


@dataclass(frozen=True)
class Classification(OfClasses):
    """Targets: int64 [B]; after mixing, probabilities [B, K]. `outputs`: the number of classes."""

    kind: ClassVar = "classification"
    title: ClassVar = "Classification"
    purpose: ClassVar = "classes"
    metrics: ClassVar[Sequence[Declaration]] = class_metrics.METRICS
    accuracy: ClassVar = "accuracy"

    def describe(self, window: tuple[int, ...], targets: Tensor, classes: Names) -> str:
        counts = torch.bincount(targets, minlength=self.outputs).tolist()
        shares = format_shares(counts, classes or range(self.outputs), len(targets))
        return f"{super().describe(window, targets, classes)}, {self.outputs:,} classes: {shares}"

    def balance(self, loss: Mapping[str, Any], targets: Tensor) -> dict[str, Any]:
        if loss.get("class_weights") != "balanced":
            return {}
        return {"class_counts": torch.bincount(targets, minlength=self.outputs).tolist()}

    def report(self, metrics: dict[str, float], part: Evaluated) -> TestReport:
        confusion = confusion_matrix(part.targets, part.predictions, self.outputs)
        return TestReport(metrics, confusion, class_metrics.BY_CLASS.on(part), part)

    def beside_guessing(
        self, split: Evaluated, training: Tensor, classes: Names, unit: tuple[float, float] = (1.0, 0.0)
    ) -> str:
        guess = int(torch.bincount(training.cpu(), minlength=self.outputs).argmax())
        accuracy = (split.predictions == split.targets).double().mean().item()
        share = (split.targets == guess).double().mean().item()
        points = 100 * (accuracy - share)
        name = guess if classes is None else classes[guess]
        side = "above" if points >= 0 else "below"
        return f"{abs(points):.1f} points {side} guessing (always {name}: {100 * share:.1f} %)"

    def columns(self, classes: Names) -> list[str]:
        return ["class", "probability", *(f"p({name})" for name in classes or ())]

    def cells(self, values: Sequence[float], best: int, classes: Names) -> list[str | float]:
        cells = super().cells(values, best, classes)
        # The class of the largest output, as `dlopt eval` counts it: probabilities that are clamped may be equal.
        name = self.label(best, classes)
        return [*(["", math.nan] if name is None else [name, cells[best]]), *cells]

    def label(self, best: int, classes: Names) -> str | None:
        return None if best < 0 or classes is None else classes[best]
