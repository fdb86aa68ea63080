"""Two heads with two losses: the digit, and how much ink it has. Each part of the loss is logged.

cd docs/examples/tasks
dlopt train task=two_heads.DigitAndInk allow_packages=[two_heads] task.weight=0.5 monitor=val_accuracy
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dlopt.extend import Draws, NonNegative, UserTask


class DigitAndInk(UserTask):
    values: ClassVar = {"accuracy": "max", "ink_error": "min"}

    def __init__(self, *, weight: NonNegative = 1.0) -> None:
        self.weight = weight

    def model_arguments(self, shape, classes):
        return {"input_shape": shape, "classes": classes + 1}  # a logit for each digit, and the ink

    def loss(self, model, batch, draws: Draws) -> dict[str, Tensor]:
        images, digits = batch
        logits, ink = model(images).split([10, 1], 1)
        found = F.mse_loss(ink.flatten(), images.flatten(1).mean(1))
        return {"digit": F.cross_entropy(logits, digits), "ink": self.weight * found}

    def evaluate(self, model, batches, draws: Draws, split):
        right, errors = [], []
        for images, digits in batches:
            logits, ink = model(images).split([10, 1], 1)
            right.append(logits.argmax(1) == digits)
            errors.append((ink.flatten() - images.flatten(1).mean(1)).abs())
        return {"accuracy": torch.cat(right).double().mean(), "ink_error": torch.cat(errors).mean()}
