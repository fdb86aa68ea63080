"""Operations that choose among other operations, independently for each sample."""

from abc import abstractmethod
from typing import Annotated

from annotated_types import Interval
from torch import Tensor

from dlopt.augment.colour import Brightness, Contrast, Saturation
from dlopt.augment.geometry import Rotate, ShearX, ShearY, TranslateX, TranslateY
from dlopt.augment.operation import DrawnStep, Draws, FixedStrengthDraws, Operation, Shape
from dlopt.augment.tone import AutoContrast, Equalize, Posterize, Sharpness, Solarize
from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count

LEVELS = 31


class RandomMix(Operation):
    """Applies `n` of the operations to each sample, in list order; all subsets are equally likely."""

    def __init__(self, *, n: Count, operations: list[Operation]) -> None:
        if n > len(operations):
            raise UserError(f"n={n}: more than the {len(operations)} operations in the list")
        self.n = n
        self.operations = operations

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        selected = draws.subset(self.n, len(self.operations))
        steps = []
        for i, operation in enumerate(self.operations):
            if operation.output_shape(shape) != shape:
                raise UserError(f"{type(operation).__name__} changes the image size, which RandomMix does not allow")
            steps += [step.masked(selected[:, i]) for step in operation.plan(draws, shape)]
        return steps

    def choices(self, shape: Shape) -> list[Operation]:
        return self.operations


class _RandomChoices(Operation):
    """Applies `n` operations drawn uniformly from `choices` and the identity, each with a random sign."""

    n: int

    @abstractmethod
    def strength(self, draws: Draws) -> Tensor | float: ...

    def plan(self, draws: Draws, shape: Shape) -> list[DrawnStep]:
        operations = self.choices(shape)
        steps = []
        for _ in range(self.n):
            choice = draws.integers(0, len(operations))  # len(operations) is the identity
            sign = 1.0 - 2.0 * draws.chance(0.5)
            fixed = FixedStrengthDraws(draws, self.strength(draws), sign)
            for i, operation in enumerate(operations):
                steps += [step.masked(choice == i) for step in operation.plan(fixed, shape)]
        return steps


def _operations(
    *, shear: float, translate: tuple[float, float], degrees: float, factor: float, bits: int
) -> list[Operation]:
    return [
        ShearX(limit=shear, about="corner"),
        ShearY(limit=shear, about="corner"),
        TranslateX(limit=translate[0]),
        TranslateY(limit=translate[1]),
        Rotate(degrees=degrees),
        Brightness(limit=factor),
        Saturation(limit=factor),
        Contrast(limit=factor),
        Sharpness(limit=factor),
        Posterize(bits=bits),
        Solarize(limit=1.0),
        AutoContrast(),
        Equalize(),
    ]


class RandAugment(_RandomChoices):
    """Applies `n` operations drawn with replacement from 14, all at one `magnitude` (Cubuk et al. 2020).

    Operations, ranges and the 31 levels of magnitude (0..30) are torchvision's. As in every pipeline, geometric
    operations run first, as one bilinear warp; the others follow in the order in which they were drawn.
    """

    def __init__(self, *, n: Count, magnitude: Annotated[int, Interval(ge=0, le=LEVELS - 1)]) -> None:
        self.n = n
        self.magnitude = magnitude

    def strength(self, draws: Draws) -> float:
        return self.magnitude / (LEVELS - 1)

    def choices(self, shape: Shape) -> list[Operation]:
        return _operations(shear=0.3, translate=(150 / 331, 150 / 331), degrees=30.0, factor=0.9, bits=4)


class TrivialAugment(_RandomChoices):
    """Applies one of 14 operations at a random strength: the "wide" space of Müller & Hutter 2021.

    Operations, ranges and the 31 levels of magnitude are torchvision's; translations go up to 32 pixels.
    """

    n = 1

    def strength(self, draws: Draws) -> Tensor:
        return draws.integers(0, LEVELS - 1) / (LEVELS - 1)

    def choices(self, shape: Shape) -> list[Operation]:
        translate = 32 / shape[2], 32 / shape[1]
        return _operations(shear=0.99, translate=translate, degrees=135.0, factor=0.99, bits=6)
