"""A data set with further tensors of its samples, and losses that read them, as a user writes both."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.data.samples import Dataset, InMemory
from dlopt.losses import CrossEntropy

SIZES = {"train": 70, "val": 20, "test": 30}


PEOPLE = [
    "data=digits", "data._target_=tests.support.further.people", "allow_packages=[tests]", "model=mlp",
    "model.widths=[6]", "model.norm=none", "data.batch_size=19", "data.workers=0", "device=cpu", "threads=1",
    "tracking=[]", "precision=fp64", "schedule=constant", "optimizer.lr=0.05", "epochs=2",
]  # fmt: skip
WEIGHTED, AGED = "+data.weights=given", "loss=tests.support.further.AgeLoss"


def people(*, lacks: str = "", weights: str = "", short: bool = False, images: bool = False) -> Dataset:
    """Vectors [5], or `images` [1, 4, 4], of three classes with an age.

    `lacks`: the split without ages. `weights`: 0, 1 or 2; given, or as rows that are left out and repeated. `short`:
    one age is missing.
    """
    splits = {}
    for number, (split, count) in enumerate(SIZES.items()):
        draws = torch.Generator().manual_seed(number)
        inputs = torch.randn(count, 5, generator=draws)
        if images:
            inputs = torch.randint(256, (count, 1, 4, 4), generator=draws, dtype=torch.uint8)
        further = {"height": torch.rand(count, generator=draws)}
        if split != lacks:
            further["age"] = 3 * torch.rand(count - short, generator=draws)
        if weights == "given":
            further["weight"] = (torch.arange(count) % 4 % 3).float()
        splits[split] = InMemory(inputs, torch.arange(count) % 3, None, further)
    if weights == "repeated":
        times = torch.arange(SIZES["train"]) % 4 % 3
        splits["train"] = splits["train"].select(torch.arange(len(times)).repeat_interleave(times))
    return Dataset(*splits.values(), ("a", "b", "c"))


class AgeLoss(nn.Module):
    """Weighs the cross-entropy by the age, which also scales the first output."""

    def forward(self, outputs: Tensor, targets: Tensor, *, age: Tensor) -> Tensor:
        return (F.cross_entropy(outputs, targets, reduction="none") * age + (outputs[:, 0] - age).square()).mean()


class WideLoss(nn.Module):
    """Of outputs [N, 4]: the last one is the age."""

    def forward(self, outputs: Tensor, targets: Tensor, *, age: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, :3], targets) + F.mse_loss(outputs[:, 3], age)


class AgedEntropy(CrossEntropy):
    """dlopt's own loss, weighed by the age."""

    def __init__(self, *, classes: int) -> None:
        super().__init__(label_smoothing=0.0, class_weights=None, classes=classes)

    def forward(self, outputs: Tensor, targets: Tensor, *, age: Tensor) -> Tensor:  # type: ignore[override]
        return (F.cross_entropy(outputs, targets, reduction="none") * age).mean()


class WeightLoss(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor, *, weight: Tensor) -> Tensor:
        return (outputs.mean(1) * weight).mean()


class OptionalLoss(nn.CrossEntropyLoss):
    """Has a keyword of its own, which is no tensor of the data."""

    def forward(self, outputs: Tensor, targets: Tensor, *, height: float = 2.0, **others: Any) -> Tensor:
        return height * super().forward(outputs, targets)


class Wide(nn.Module):
    """One output more than classes."""

    def __init__(self, *, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0], classes + 1)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        return outputs
