"""Images, and a function that runs operations with given strengths."""

from typing import Any

import torch
from torch import Tensor

from dlopt.augment import Draws, Operation, Pipeline
from dlopt.augment.operation import FixedStrengthDraws
from dlopt.augment.warp import Affine, Border
from dlopt.basics.random import generator
from dlopt.data.samples import InMemory


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


def in_memory(images: Tensor) -> InMemory:
    return InMemory(images, torch.zeros(len(images), dtype=torch.long))


# Of six samples: strengths as fractions of the maximum, and the signs of their changes.
STRENGTHS = torch.tensor([1.0, 0.7, 0.25, 0.0, 0.5, 1.0])
SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])


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


def matrix(operation: Operation, total: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Returns the drawn maps [total, 2, 3] of an affine operation."""
    (step,) = operation.plan(Draws(generator("cpu", seed), total), shape)
    assert isinstance(step, Affine)
    return step.matrix(total, torch.device("cpu"))


def apply(
    pipeline: Pipeline, images: Tensor, targets: Tensor, seed: int = 0, part: slice | None = None
) -> tuple[Tensor, Tensor]:
    """Applies a pipeline to a shard of a batch, with the draws of the whole batch; the seed is the epoch, too."""
    total, device = len(images), images.device.type
    if part is not None:
        images, targets = images[part], targets[part]
    part = part or slice(0, total)
    indices = torch.arange(total, device=device)[part]
    keys: dict[str, Any] = {"generator": generator(device, seed), "total": total, "shard": part}
    return pipeline(images, targets, **keys, indices=indices, epoch=seed)
