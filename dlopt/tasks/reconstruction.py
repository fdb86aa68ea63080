"""The model reconstructs its input, an image."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.losses import reconstructions
from dlopt.tasks.task import Task


@dataclass(frozen=True)
class Reconstruction(Task):
    """Targets: the samples, float [B, K], before the normalization; 0..255 becomes 0..1. `outputs`: of an image."""

    kind: ClassVar = "reconstruction"
    title: ClassVar = "Reconstruction of images"
    purpose: ClassVar = "values per target"
    reads_labels: ClassVar = False
    keeps_outputs: ClassVar = False
    draws_outputs: ClassVar = True

    @classmethod
    def instead_of(cls, task: Task, shape: tuple[int, ...], choice: str) -> "Reconstruction":
        if task.tokens is not None or len(shape) != 3:
            what = "vectors" if task.tokens is None else "a text"
            raise UserError(f"{choice}: reconstructs images, but the samples are {what}")
        return cls(math.prod(shape), task.white)

    def split(self, samples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        targets = samples.flatten(1).to(torch.promote_types(samples.dtype, torch.float32))
        return samples, targets / self.white

    def values(self, outputs: Tensor, loss: nn.Module) -> Tensor:
        return reconstructions(outputs, loss)

    def check_predicts(self, key: str, path: object) -> None:
        raise UserError(f"{key}={path}: its model reconstructs images; `dlopt eval checkpoint={path}` draws some")
