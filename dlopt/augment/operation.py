"""Base classes: an operation draws parameters for the global batch as steps, which can be applied to a shard of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Self

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import NOT_DECREASING, Positive, PositiveFraction

Span = Annotated[tuple[Positive, Positive], NOT_DECREASING]
FractionSpan = Annotated[tuple[PositiveFraction, PositiveFraction], NOT_DECREASING]
Shape = tuple[int, int, int]
"""Channels, height, width of one image."""


def image_shape(shape: Sequence[int]) -> Shape:
    """Returns the shape of one sample. Raises `UserError` unless it is an image."""
    if len(shape) != 3:
        raise UserError(
            f"augmentation: requires images [channels, height, width], but the samples of this dataset have the shape "
            f"{list(shape)}; use augmentation=none"
        )
    channels, height, width = shape
    return channels, height, width


class Draws:
    """Draws per-sample random numbers for a global batch of `total` samples.

    Every rank draws for the whole batch from an identically seeded generator and then uses its own shard, so the
    numbers do not depend on the number of ranks. They do depend on the order of the calls. All tensors are on the
    generator's device.
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
        """[total] positions in the training set; zero outside this rank's shard."""
        self.epoch = epoch

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Returns [total, *shape] float32 in [low, high)."""
        numbers = torch.empty(self.total, *shape, device=self.device)
        return numbers.uniform_(low, high, generator=self.generator)

    def symmetric(self, limit: float) -> Tensor:
        """Returns [total] float32 in [-limit, limit): signed strengths."""
        return self.uniform(-limit, limit)

    def symmetric_integers(self, limit: int) -> Tensor:
        """Returns [total] int64 in -limit..limit, inclusive."""
        return self.integers(-limit, limit)

    def integers(self, low: int, high: int) -> Tensor:
        """Returns [total] int64 in low..high, inclusive."""
        return torch.randint(low, high + 1, (self.total,), generator=self.generator, device=self.device)

    def strength(self) -> Tensor:
        """Returns [total] float32 in [0, 1): strengths of one-sided operations."""
        return self._rand()

    def position(self) -> Tensor:
        """Returns [total] float32 in [0, 1): relative positions."""
        return self._rand()

    def chance(self, p: float) -> Tensor:
        """Returns [total] bool, true with probability p."""
        return self._rand() < p

    def subset(self, n: int, k: int) -> Tensor:
        """Returns [total, k] bool with n true entries per row, all subsets equally likely."""
        return self._rand(k).argsort(1).argsort(1) < n

    def normal(self, *shape: int) -> Tensor:
        """Returns [total, *shape] float32 from the standard normal distribution."""
        return torch.randn(self.total, *shape, generator=self.generator, device=self.device)

    def beta(self, alpha: float) -> Tensor:
        """Returns [total] float32 from Beta(alpha, alpha)."""
        # torch.distributions.Beta takes no generator; this is the function it calls. Small alphas underflow float32.
        real = torch.float32 if self.device.type == "mps" else torch.float64
        gammas = torch._standard_gamma(
            torch.full((self.total, 2), alpha, dtype=real, device=self.device), generator=self.generator
        )
        return (gammas[:, 0] / gammas.sum(1)).float()

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(self.total, *shape, generator=self.generator, device=self.device)


class FixedStrengthDraws(Draws):
    """Draws with a given strength, as a fraction 0..1 of an operation's maximum, instead of a random one.

    `sign` is the direction of two-sided operations. Other random numbers (noise, for example) still come from the
    generator of `draws`.
    """

    def __init__(self, draws: Draws, strength: Tensor | float, sign: Tensor | float = 1.0) -> None:
        super().__init__(draws.generator, draws.total, indices=draws.indices, epoch=draws.epoch)
        ones = torch.ones(draws.total, device=draws.device)
        self._strength = ones * strength
        self._signed = self._strength * sign

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        strength = self._strength.view(-1, *(1 for _ in shape)).expand(-1, *shape)
        return strength * (high - low) + low

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
        """Returns two standard deviations at full strength."""
        return self.uniform(0.0, 2.0, *shape)

    def beta(self, alpha: float) -> Tensor:
        return 1.0 - self._strength / 2.0


@dataclass
class DrawnStep(ABC):
    """Drawn parameters of an operation: tensors with one row per sample."""

    def shard(self, shard: slice) -> Self:
        """Returns the step for a shard of the global batch."""
        return self._index(shard)

    @abstractmethod
    def masked(self, mask: Tensor) -> Self:
        """Returns the step that changes only the samples where mask [n] is true."""

    def _index(self, rows: slice | Tensor) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if isinstance(value, Tensor)})


class Warp(DrawnStep):
    """Maps output pixels to input pixels. All warps of a pipeline run first, as one resampling."""


class PixelStep(DrawnStep):
    """Changes pixel values. Steps run by increasing `phase`, and in list order within a phase."""

    phase = 0
    keeps_dtype = False

    @abstractmethod
    def apply(self, images: Tensor) -> Tensor:
        """Transforms images [b, C, H, W] in 0..255: float32, or any dtype if `keeps_dtype`."""


class MixingStep(DrawnStep):
    """Mixes samples of the batch. Mixing steps run last."""

    @abstractmethod
    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes images [b, C, H, W] and targets (labels [b], or the result of an earlier mixing step)."""


class Operation(ABC):
    """One entry of a pipeline's list."""

    in_grey_levels = False
    """Whether it needs values in 0..255: it rounds or clamps them, or its strength has this unit."""

    @abstractmethod
    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        """Draws the parameters for the whole batch; `shape`: of the operation's input images."""

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def choices(self, shape: Shape) -> "list[Operation]":
        """Returns the operations from which this operation chooses; itself if it does not choose."""
        return [self]


def leaves(operation: Operation, shape: Shape) -> list[Operation]:
    """Returns the operations from which an operation chooses, at any depth; itself if it does not choose."""
    choices = operation.choices(shape)
    return choices if choices == [operation] else [leaf for choice in choices for leaf in leaves(choice, shape)]


def first_fitting(fits: Tensor, *sizes: Tensor) -> list[Tensor]:
    """Returns the sizes [n] of the first fitting trial, given `fits` and `sizes` [n, trials]; trial 0 if none fits."""
    first = fits.int().argmax(1, keepdim=True)
    return [size.gather(1, first)[:, 0] for size in sizes]
