"""The class that a prediction names."""

import math
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from dlopt.losses import MSE
from dlopt.metrics.sums import predicted_classes
from dlopt.trained.classify import _classify
from dlopt.trained.restore import Trained


def trained(outputs: torch.Tensor, loss: nn.Module) -> Trained:
    names = [str(number) for number in range(outputs.shape[1])]
    fields: dict[str, Any] = {"outputs": lambda _: outputs, "loss": loss, "classes": names}
    return cast(Trained, SimpleNamespace(task=SimpleNamespace(labels=None), **fields))


def test_classes_are_those_that_eval_counts() -> None:
    """After training with MSE also where the clamped outputs are equal; NaN names no class."""
    outputs = torch.tensor([[1.2, 1.5, 0.1], [-0.5, -0.4, -0.1], [0.1, math.nan, 0.3], [0.2, 0.7, 0.1]])
    images: list[Any] = [torch.zeros(1, 2, 2)] * 4
    for loss in (MSE(classes=3), nn.CrossEntropyLoss()):
        results = _classify(["a", "b", "c", "d"], images, trained(outputs, loss))
        classes = [result.best for _, result in results if not isinstance(result, str)]
        assert classes == [1, 2, -1, 1] == predicted_classes(outputs).tolist()
