"""What an operation is: it draws parameters for the global batch, as steps that can be applied to a part of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Draws:
    """Per-sample random numbers for a global batch of `total` samples, in the order in which they are asked for.

    Every rank draws for the whole batch from an equally seeded generator and takes its part afterwards, so that
    the numbers do not depend on the number of ranks. All tensors lie on the generator's device.
    """

    def __init__(
        self, generator: torch.Generator, total: int, *, indices: Tensor | None = None, epoch: int | None = None
    ) -> None:
        self.generator = generator
        self.total = total
        self.device = generator.device
        self.indices = indices
        """[total] positions in the training set; known for the own part only, zero elsewhere."""
        self.epoch = epoch

    def uniform(self, low: float, high: float) -> Tensor:
        """[total] float32 in [low, high)."""
        return torch.rand(self.total, generator=self.generator, device=self.device) * (high - low) + low

    def symmetric(self, limit: float) -> Tensor:
        """[total] float32 in [-limit, limit)."""
        return self.uniform(-limit, limit)

    def integers(self, low: int, high: int) -> Tensor:
        """[total] int64 from low to high, both included."""
        return torch.randint(low, high + 1, (self.total,), generator=self.generator, device=self.device)

    def chance(self, p: float) -> Tensor:
        """[total] bool, true with probability p."""
        return torch.rand(self.total, generator=self.generator, device=self.device) < p


@dataclass
class Step(ABC):
    """Drawn parameters, one row per sample."""

    @abstractmethod
    def take(self, part: slice) -> "Step":
        """The step for a part of the global batch."""

    @abstractmethod
    def only(self, mask: Tensor) -> "Step":
        """The step for the samples where mask [total] is true; the others stay as they are."""


class Operation(ABC):
    """One entry of a pipeline's list."""

    @abstractmethod
    def plan(self, draws: Draws, size: tuple[int, int]) -> list[Step]:
        """Draws for the whole batch; `size` (height, width) is that of the images that reach this operation."""
