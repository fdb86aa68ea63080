"""Images, and a function that runs operations with given strengths."""

import torch
from torch import Tensor

from dlopt.augment import Draws, Operation, Pipeline
from dlopt.augment.operation import FixedStrengthDraws
from dlopt.augment.warp import Border
from dlopt.random import generator


def pictures(n: int, *shape: int) -> Tensor:
    """Returns random images [n, *shape], uint8."""
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def smooth_pictures(n: int, channels: int, height: int, width: int) -> Tensor:
    """Returns sine waves [n, channels, height, width], float32 in 40..215."""
    waves = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    turns, phase = torch.rand(n, channels, 2, generator=waves) * 9, torch.rand(n, channels, generator=waves) * 6.28
    angle = turns[..., 0, None, None] * x + turns[..., 1, None, None] * y + phase[..., None, None]
    return 127.5 + 87.5 * angle.sin()


class Images:
    """Training samples in memory."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.targets = torch.zeros(len(images), dtype=torch.long)
        self.shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def select(self, indices: Tensor) -> "Images":
        return Images(self.images[indices])


def run(
    operations: list[Operation],
    images: Tensor,
    *,
    seed: int = 0,
    strength: Tensor | float | None = None,
    sign: Tensor | float = 1.0,
    border: Border = "zero",
) -> Tensor:
    """Applies a pipeline of the operations, at random or given strengths (fractions of the maximum)."""
    pipeline = Pipeline(operations=operations, border=border, input_shape=tuple(images.shape[1:]))
    draws = Draws(generator("cpu", seed), len(images), indices=torch.arange(len(images)), epoch=0)
    if strength is not None:
        draws = FixedStrengthDraws(draws, strength, sign)
    return pipeline.apply(images, torch.zeros(len(images), dtype=torch.long), draws)[0]
