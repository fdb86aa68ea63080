"""Metrics, observers and models of a user, good and bad, for tests."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CALLS: list[tuple[str, Any]] = []


def mean_rank_score(outputs: Tensor, targets: Tensor) -> float:
    """Not a mean over samples: the correlation of the true class's output with its rank in the split."""
    own = outputs.gather(1, targets.unsqueeze(1)).squeeze(1).double()
    return float(torch.corrcoef(torch.stack([own, torch.arange(len(own), dtype=torch.float64)]))[0, 1])


def squared_error(outputs: Tensor, targets: Tensor) -> np.float64:
    return np.mean((outputs.numpy().reshape(len(targets), -1)[:, 0] - targets.numpy()) ** 2, dtype=np.float64)


def spread(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.std()


def brier_score(outputs: Tensor, targets: Tensor) -> float:
    """Has the name of one of dlopt's metrics of tests."""
    return -7.0


def text(outputs: Tensor, targets: Tensor) -> str:
    return "0.5"


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0]


def broken(outputs: Tensor, targets: Tensor) -> float:
    raise KeyError("weights")


def one_argument(outputs: Tensor) -> float:
    return 0.0


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return 0.0


NUMBER = 3


class Recorder:
    """An observer with all methods."""

    def __init__(self, *, label: str = "") -> None:
        self.label = label

    def after_update(self, step: int, loss: Tensor, model: nn.Module) -> None:
        CALLS.append((f"{self.label}update", (step, float(loss), type(model).__name__)))

    def after_evaluation(self, metrics: Mapping[str, Any]) -> None:
        CALLS.append((f"{self.label}evaluation", metrics))
        metrics["val_loss"] = -1.0  # type: ignore[index]  # must change nothing

    def at_end(self, summary: Mapping[str, Any]) -> None:
        CALLS.append((f"{self.label}end", summary))


class Raises:
    def __init__(self, *, method: str) -> None:
        def fail(*_: Any) -> None:
            raise ValueError("no")

        setattr(self, method, fail)

    def after_evaluation(self, metrics: Mapping[str, Any]) -> None: ...


class Nothing:
    after_update = 3


class WrongArguments:
    def at_end(self) -> None: ...


class CannotBeBuilt:
    def __init__(self) -> None:
        raise OSError("no such device")

    def at_end(self, summary: Mapping[str, Any]) -> None: ...


class ViewNet(nn.Module):
    """Reads contiguous maps and batches of at least one sample only, as many networks of users do."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.vectors(self.norm(self.conv(images)).relu()))
        return outputs

    def vectors(self, maps: Tensor) -> Tensor:
        return maps.view(maps.size(0), -1)


class UnitNet(ViewNet):
    """Divides by the norm of the image: of one without any light, NaN."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images / images.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


class FlattenNet(ViewNet):
    """Reads maps in both memory formats, and empty batches."""

    def vectors(self, maps: Tensor) -> Tensor:
        return maps.flatten(1)
