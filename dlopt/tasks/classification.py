"""Each sample has one class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dlopt.basics.formats import format_shares
from dlopt.losses import MSE, probabilities
from dlopt.metrics import classes as class_metrics
from dlopt.metrics.classes import confusion_matrix
from dlopt.metrics.declaration import Declaration, Evaluated
from dlopt.tasks.report import TestReport
from dlopt.tasks.task import Average, Task


@dataclass(frozen=True)
class Classification(Task):
    """Targets: int64 [B]; after mixing, probabilities [B, K]. `outputs`: the number of classes."""

    kind: ClassVar = "classification"
    title: ClassVar = "Classification"
    purpose: ClassVar = "classes"
    metrics: ClassVar[Sequence[Declaration]] = class_metrics.METRICS
    accuracy: ClassVar = "accuracy"

    def describe(self, window: tuple[int, ...], targets: Tensor, classes: Sequence[str] | None) -> str:
        counts = torch.bincount(targets, minlength=self.size).tolist()
        shares = format_shares(counts, classes or range(self.size), len(targets))
        return f"{super().describe(window, targets, classes)}, {self.size:,} classes: {shares}"

    @property
    def target_arguments(self) -> dict[str, int | None]:
        return {"classes": self.size, "labels": None}

    def balance(self, loss: Mapping[str, Any], targets: Tensor) -> dict[str, Any]:
        if loss.get("class_weights") != "balanced":
            return {}
        return {"class_counts": torch.bincount(targets, minlength=self.size).tolist()}

    def values(self, outputs: Tensor, loss: nn.Module) -> Tensor:
        return probabilities(outputs, loss)

    def report(self, metrics: dict[str, float], part: Evaluated) -> TestReport:
        confusion = confusion_matrix(part.targets, part.predictions, self.size)
        return TestReport(metrics, confusion, class_metrics.BY_CLASS.on(part), part)

    def beside_guessing(
        self, split: Evaluated, training: Tensor, classes: Sequence[str] | None, unit: tuple[float, float] = (1.0, 0.0)
    ) -> str:
        guess = int(torch.bincount(training.cpu(), minlength=self.size).argmax())
        accuracy = (split.predictions == split.targets).double().mean().item()
        share = (split.targets == guess).double().mean().item()
        points = 100 * (accuracy - share)
        name = guess if classes is None else classes[guess]
        side = "above" if points >= 0 else "below"
        return f"{abs(points):.1f} points {side} guessing (always {name}: {100 * share:.1f} %)"

    def choose_average(self, average: Average | None, loss: nn.Module, key: str) -> Average:
        # After a squared error outputs are estimates of probabilities, not logits of them.
        return super().choose_average(average, loss, key) if isinstance(loss, MSE) else average or "probabilities"

    def columns(self, classes: Sequence[str] | None) -> list[str]:
        return ["class", "probability", *(f"p({name})" for name in classes or ())]

    def cells(self, values: Sequence[float], best: int, classes: Sequence[str] | None) -> list[str | float]:
        cells = super().cells(values, best, classes)
        # The class of the largest output, as `dlopt eval` counts it: probabilities that are clamped may be equal.
        name = self.label(best, classes)
        return [*(["", math.nan] if name is None else [name, cells[best]]), *cells]

    def label(self, best: int, classes: Sequence[str] | None) -> str | None:
        return None if best < 0 or classes is None else classes[best]
