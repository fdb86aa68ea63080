"""Each sample may have several labels, or none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_count, format_shares
from dlopt.losses import label_probabilities
from dlopt.metrics import labels as label_metrics
from dlopt.metrics.declaration import Declaration, Evaluated
from dlopt.metrics.labels import THRESHOLD
from dlopt.tasks.report import TestReport
from dlopt.tasks.task import Average, Names, Task


@dataclass(frozen=True)
class MultiLabel(Task):
    """Targets: float [B, K], whether a sample has each label, 0 or 1. `outputs`: the number of labels."""

    kind: ClassVar = "multi-label"
    title: ClassVar = "Several labels per sample"
    purpose: ClassVar = "labels"
    metrics: ClassVar[Sequence[Declaration]] = label_metrics.METRICS

    def describe(self, window: tuple[int, ...], targets: Tensor, classes: Names) -> str:
        shares = format_shares(targets.sum(0).tolist(), classes or range(self.outputs), len(targets))
        return f"{super().describe(window, targets, classes)}, {format_count('labels', self.outputs)}: {shares}"

    @property
    def target_arguments(self) -> dict[str, int | None]:
        return {"classes": None, "labels": self.outputs}

    def balance(self, loss: Mapping[str, Any], targets: Tensor) -> dict[str, Any]:
        super().balance(loss, targets)
        if loss.get("pos_weight") != "balanced":
            return {}
        return {"label_fractions": targets.double().mean(0).tolist()}

    def values(self, outputs: Tensor, loss: nn.Module) -> Tensor:
        return label_probabilities(outputs, loss)

    def report(self, metrics: dict[str, float], part: Evaluated) -> TestReport:
        return TestReport(metrics, by_class=label_metrics.REPORT.on(part).by_label, part=part)

    def choose_average(self, average: Average | None, loss: nn.Module, key: str) -> Average:
        if average == "probabilities":
            raise UserError(
                f"{key}=probabilities: the labels of a sample have no common distribution; use {key}=logits"
            )
        return "logits"

    def columns(self, classes: Names) -> list[str]:
        return ["labels", *(f"p({name})" for name in classes or ())]

    def cells(self, values: Sequence[float], best: int, classes: Names) -> list[str | float]:
        return [";".join(self.labels_of(values, classes)), *super().cells(values, best, classes)]

    def labels_of(self, values: Sequence[float], classes: Names) -> tuple[str, ...]:
        return tuple(name for name, each in zip(classes or (), values, strict=True) if each >= THRESHOLD)
