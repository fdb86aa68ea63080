"""Annotated types with ranges for the arguments of components; configs are validated against them."""

from typing import Annotated

from annotated_types import Ge, Gt, Interval

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
PositiveFraction = Annotated[float, Interval(gt=0, le=1)]
OpenFraction = Annotated[float, Interval(gt=0, lt=1)]
Count = Annotated[int, Ge(1)]
Depth = Annotated[int, Interval(ge=1, le=10_000)]  # layers; larger values are almost certainly typos
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
