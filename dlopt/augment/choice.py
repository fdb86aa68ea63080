"""Operations that choose among operations, for each sample its own."""

from abc import abstractmethod
from typing import Annotated

from annotated_types import Interval
from torch import Tensor

from dlopt.augment.colour import Brightness, Contrast, Saturation
from dlopt.augment.geometry import Rotate, ShearX, ShearY, TranslateX, TranslateY
from dlopt.augment.operation import Draws, Graded, Operation, Shape, Step
from dlopt.augment.tone import AutoContrast, Equalize, Posterize, Sharpness, Solarize
from dlopt.errors import UserError
from dlopt.ranges import Count

LEVELS = 31


class RandomMix(Operation):
    """Applies `n` of the operations to each sample: any n equally likely, in the order of the list."""

    def __init__(self, *, n: Count, operations: list[Operation]) -> None:
        if n > len(operations):
            raise UserError(f"n={n}: more than the {len(operations)} operations to choose from")
        self.n = n
        self.operations = operations

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        chosen = draws.subset(self.n, len(self.operations))
        steps = []
        for i, operation in enumerate(self.operations):
            if operation.output_shape(shape) != shape:
                raise UserError(f"{type(operation).__name__} changes the image size and cannot be one of a random mix")
            steps += [step.only(chosen[:, i]) for step in operation.plan(draws, shape)]
        return steps

    def parts(self, shape: Shape) -> list[Operation]:
        return self.operations


class _Slots(Operation):
    """`n` times one operation of `parts`, with equal odds, at a strength of its own and to a random side."""

    n: int

    @abstractmethod
    def strength(self, draws: Draws) -> Tensor | float: ...

    def plan(self, draws: Draws, shape: Shape) -> list[Step]:
        operations = self.parts(shape)
        steps = []
        for _ in range(self.n):
            choice = draws.integers(0, len(operations))  # the last one is to do nothing
            sign = 1.0 - 2.0 * draws.chance(0.5)
            graded = Graded(draws, self.strength(draws), sign)
            for i, operation in enumerate(operations):
                steps += [step.only(choice == i) for step in operation.plan(graded, shape)]
        return steps


class RandAugment(_Slots):
    """`n` operations drawn with replacement from 14, all at one `magnitude` (Cubuk et al. 2020).

    Operations, ranges and the 31 levels of magnitude (0..30) are torchvision's. As everywhere in a pipeline the
    drawn geometric operations run first, as one bilinear warp; the others follow in the order in which they were drawn.
    """

    def __init__(self, *, n: Count, magnitude: Annotated[int, Interval(ge=0, le=LEVELS - 1)]) -> None:
        self.n = n
        self.magnitude = magnitude

    def strength(self, draws: Draws) -> float:
        return self.magnitude / (LEVELS - 1)

    def parts(self, shape: Shape) -> list[Operation]:
        return [
            ShearX(limit=0.3, about="corner"),
            ShearY(limit=0.3, about="corner"),
            TranslateX(limit=150 / 331),
            TranslateY(limit=150 / 331),
            Rotate(degrees=30.0),
            Brightness(limit=0.9),
            Saturation(limit=0.9),
            Contrast(limit=0.9),
            Sharpness(limit=0.9),
            Posterize(bits=4),
            Solarize(limit=1.0),
            AutoContrast(),
            Equalize(),
        ]


class TrivialAugment(_Slots):
    """One of 14 operations at a random strength: the "wide" space of Müller & Hutter 2021.

    Operations, ranges and the 31 levels of magnitude are torchvision's; translations go up to 32 pixels.
    """

    n = 1

    def strength(self, draws: Draws) -> Tensor:
        return draws.integers(0, LEVELS - 1) / (LEVELS - 1)

    def parts(self, shape: Shape) -> list[Operation]:
        return [
            ShearX(limit=0.99, about="corner"),
            ShearY(limit=0.99, about="corner"),
            TranslateX(limit=32 / shape[2]),
            TranslateY(limit=32 / shape[1]),
            Rotate(degrees=135.0),
            Brightness(limit=0.99),
            Saturation(limit=0.99),
            Contrast(limit=0.99),
            Sharpness(limit=0.99),
            Posterize(bits=6),
            Solarize(limit=1.0),
            AutoContrast(),
            Equalize(),
        ]
