"""What an operation is: it draws parameters for the global batch, as steps that can be applied to a part of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from dlopt.errors import UserError

Shape = tuple[int, int, int]
"""Channels, height, width of one image."""


def image_shape(shape: Sequence[int]) -> Shape:
    """The shape of one sample, if it is that of an image.

    Raises:
        UserError: it is not.
    """
    if len(shape) != 3:
        raise UserError(
            f"augmentation: works on images [channels, height, width], but this dataset's samples have the shape "
            f"{list(shape)}; use augmentation=none"
        )
    channels, height, width = shape
    return channels, height, width


class Draws:
    """Per-sample random numbers for a global batch of `total` samples, in the order in which they are asked for.

    Every rank draws for the whole batch from an equally seeded generator and takes its part afterwards, so that
    the numbers do not depend on the number of ranks. All tensors lie on the generator's device.
    """

    def __init__(
        self,
        generator: torch.Generator,
        total: int,
        *,
        indices: Tensor | None = None,
        epoch: int | Tensor | None = None,
    ) -> None:
        self.generator = generator
        self.total = total
        self.device = generator.device
        self.indices = indices
        """[total] positions in the training set; known for the own part only, zero elsewhere."""
        self.epoch = epoch

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """[total, *shape] float32 in [low, high)."""
        numbers = torch.empty(self.total, *shape, device=self.device)
        return numbers.uniform_(low, high, generator=self.generator)

    def symmetric(self, limit: float) -> Tensor:
        """[total] float32 in [-limit, limit): how strongly, and to which side."""
        return self.uniform(-limit, limit)

    def symmetric_integers(self, limit: int) -> Tensor:
        """[total] int64 from -limit to limit, both included."""
        return self.integers(-limit, limit)

    def integers(self, low: int, high: int) -> Tensor:
        """[total] int64 from low to high, both included."""
        return torch.randint(low, high + 1, (self.total,), generator=self.generator, device=self.device)

    def strength(self) -> Tensor:
        """[total] float32 in [0, 1): how strongly, for what has one side only."""
        return self._rand()

    def position(self) -> Tensor:
        """[total] float32 in [0, 1): where."""
        return self._rand()

    def chance(self, p: float) -> Tensor:
        """[total] bool, true with probability p."""
        return self._rand() < p

    def subset(self, n: int, k: int) -> Tensor:
        """[total, k] bool with n true entries in each row, all choices of n equally likely."""
        return self._rand(k).argsort(1).argsort(1) < n

    def normal(self, *shape: int) -> Tensor:
        """[total, *shape] float32 from the standard normal distribution."""
        return torch.randn(self.total, *shape, generator=self.generator, device=self.device)

    def beta(self, alpha: float) -> Tensor:
        """[total] float32 from Beta(alpha, alpha)."""
        # what torch.distributions.Beta calls, which takes no generator; float64, as small alphas underflow float32
        real = torch.float32 if self.device.type == "mps" else torch.float64
        gammas = torch._standard_gamma(
            torch.full((self.total, 2), alpha, dtype=real, device=self.device), generator=self.generator
        )
        return (gammas[:, 0] / gammas.sum(1)).float()

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(self.total, *shape, generator=self.generator, device=self.device)


class Graded(Draws):
    """Draws whose strengths are given instead of random: `strength` in 0..1 of the most that an operation does.

    What `draws` has to say otherwise (noise, for instance) stays random. `sign` is the side of two-sided operations.
    """

    def __init__(self, draws: Draws, strength: Tensor | float, sign: Tensor | float = 1.0) -> None:
        super().__init__(draws.generator, draws.total, indices=draws.indices, epoch=draws.epoch)
        ones = torch.ones(draws.total, device=draws.device)
        self._strength = ones * strength
        self._signed = self._strength * sign

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        wide = self._strength.view(-1, *(1 for _ in shape)).expand(-1, *shape)
        return wide * (high - low) + low

    def symmetric(self, limit: float) -> Tensor:
        return self._signed * limit

    def symmetric_integers(self, limit: int) -> Tensor:
        return (self._signed * limit).round().long()

    def integers(self, low: int, high: int) -> Tensor:
        return self.uniform(low, high).round().long()

    def strength(self) -> Tensor:
        return self._strength

    def position(self) -> Tensor:
        return torch.full_like(self._strength, 0.5)

    def chance(self, p: float) -> Tensor:
        return torch.ones_like(self._strength, dtype=torch.bool)

    def normal(self, *shape: int) -> Tensor:
        """Two standard deviations at full strength."""
        return self.uniform(0.0, 2.0, *shape)

    def beta(self, alpha: float) -> Tensor:
        return 1.0 - self._strength / 2.0


@dataclass
class Step(ABC):
    """Drawn parameters: tensors with one row per sample."""

    def take(self, part: slice) -> Self:
        """The step for a part of the global batch."""
        return self._rows(part)

    @abstractmethod
    def only(self, mask: Tensor) -> Self:
        """The step for the samples where mask [n] is true; the others stay as they are."""

    def _rows(self, rows: slice | Tensor) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if isinstance(value, Tensor)})


class Warp(Step):
    """Maps output pixels to input pixels; all of a pipeline's run first, as one resampling."""


class PixelStep(Step):
    """Changes values. Of a pipeline's, those of a lower `phase` run first, equal ones in the listed order."""

    phase = 0

    @abstractmethod
    def apply(self, images: Tensor) -> Tensor:
        """Images [b, C, H, W] in 0..255 to the same; float32, or any dtype where `keeps_dtype`."""

    keeps_dtype = False


class MixingStep(Step):
    """Mixes samples of the batch; these run last."""

    @abstractmethod
    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] and targets (labels [b], or what an earlier mixing made of them)."""


class Operation(ABC):
    """One entry of a pipeline's list."""

    @abstractmethod
    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        """Draws for the whole batch; `shape` is that of the images which reach this operation."""

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def parts(self, shape: Shape) -> "list[Operation]":
        """The operations among which this one chooses; itself where it does not choose."""
        return [self]
