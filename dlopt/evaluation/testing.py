"""What a test comes to: figures, and the mean over several models or views."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlopt.engine.metrics import Sums
from dlopt.errors import UserError
from dlopt.evaluation import figures
from dlopt.losses import probabilities

Average = Literal["probabilities", "logits"]
Batch = tuple[Tensor, Tensor]  # outputs, targets


@dataclass(frozen=True)
class Report:
    """Figures of a test (`test_...`), and the confusion matrix [K, K] with a row per true class (None: regression)."""

    figures: dict[str, float]
    confusion: Tensor | None


def combine(members: Sequence[Sequence[Batch]], average: Average) -> list[Batch]:
    """The mean over models that were tested on the same samples. That of one model is its outputs themselves."""
    if len(members) == 1:
        return list(members[0])
    result = []
    for batches in zip(*members, strict=True):
        mean = Mean(average)
        for outputs, _ in batches:
            mean.add(outputs, 1 / len(members))
        result.append((mean.outputs, batches[0][1]))
    return result


def report(batches: Sequence[Batch], loss: nn.Module, classes: int | None) -> Report:
    """The figures of outputs; loss and accuracy are computed as those of a run."""
    sums = Sums(classes is not None)
    with torch.inference_mode():
        loss.eval()
        for outputs, targets in batches:
            sums.add(loss(outputs, targets), outputs, targets)
    means = sums.means("test")
    outputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    if classes is None:
        more = {"r2": figures.determination(outputs, targets), "mae": figures.absolute_error(outputs, targets)}
        return Report(means | {f"test_{name}": value for name, value in more.items()}, None)
    confusion = figures.confusion_matrix(targets, outputs.argmax(1), classes)
    if classes > 5:
        means["test_top5_accuracy"] = figures.top_accuracy(outputs, targets, 5)
    means["test_macro_f1"] = figures.f1_scores(confusion).nanmean().item()
    means["test_calibration_error"] = figures.calibration_error(probabilities(outputs, loss), targets)
    return Report(means, confusion.cpu())


class Mean:
    """A weighted mean of outputs; of probabilities it is kept, and given back, as logarithms."""

    def __init__(self, average: Average) -> None:
        self._average = average
        self._sum: Tensor | None = None

    def add(self, outputs: Tensor, weight: float) -> None:
        if self._average == "logits":
            self._sum = outputs * weight if self._sum is None else self._sum.add_(outputs, alpha=weight)
        else:
            term = outputs.log_softmax(1) + math.log(weight)
            self._sum = term if self._sum is None else torch.logaddexp(self._sum, term)

    @property
    def outputs(self) -> Tensor:
        assert self._sum is not None
        return self._sum


def check_same_samples(members: Sequence[Mapping[str, Any]]) -> None:
    """Raises `UserError` unless all `members` ({path, classes, batches}) were tested on the same samples."""
    first = members[0]
    for other in members[1:]:
        if other["classes"] != first["classes"]:
            raise UserError(f"checkpoint={other['path']}: its classes are not those of {first['path']}")
        same = len(other["batches"]) == len(first["batches"]) and all(
            torch.equal(a, b) for (_, a), (_, b) in zip(other["batches"], first["batches"], strict=True)
        )
        if not same:
            raise UserError(f"checkpoint={other['path']}: its test set is not that of {first['path']}")
