"""Annotated types with ranges and conditions for the arguments of components; configs are validated against them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Interval, MinLen

from dlopt.basics.errors import UserError, is_installed, not_installed

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
_T = TypeVar("_T")
NotEmpty = Annotated[list[_T], MinLen(1)]


class Duration(str):
    """A time > 0 as it is typed: 90s, 5min, 1.5h."""

    @property
    def seconds(self) -> float:
        number = self.rstrip("sminh")
        return float(number) * {"s": 1, "min": 60, "h": 3600}[self.removeprefix(number)]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        text = core_schema.str_schema(pattern=r"^([1-9][0-9]{0,5}(\.[0-9]+)?|0\.0*[1-9][0-9]*)(s|min|h)$")
        # The error of a number: one that is too small should not become a text.
        return core_schema.custom_error_schema(core_schema.no_info_after_validator_function(cls, text), "int_type")


@dataclass(frozen=True)
class Condition:
    """What a value must meet beyond its type and range: `kernel: Annotated[Count, ODD]`.

    Attributes:
        refusal: returns what is wrong with a value ("must be odd"), None if nothing is.
    """

    refusal: Callable[[Any], str | None]

    def require(self, key: str, value: Any) -> None:
        """Checks an argument of a direct call. Raises `UserError`."""
        if (refusal := self.refusal(value)) is not None:
            raise UserError(f"{key}={value}: {refusal}")

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema  # the help of commands reads annotations without it

        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        if (refusal := self.refusal(value)) is not None:
            raise UserError(refusal)
        return value


ODD = Condition(lambda number: None if number % 2 else "must be odd")
INCREASING = Condition(lambda values: None if list(values) == sorted({*values}) else "must increase")
NOT_DECREASING = Condition(lambda values: None if list(values) == sorted(values) else "must not decrease")


@cache
def layers(per_block: int, others: int) -> Condition:
    """Requires a depth of at least one block per stage."""
    examples = ", ".join(str(per_block * n + others) for n in (1, 2, 3, 4, 6, 9, 18))

    def refusal(depth: int) -> str | None:
        is_valid = depth > others and (depth - others) % per_block == 0
        return None if is_valid else f"must be {per_block}n+{others}, for example {examples}"

    return Condition(refusal)


@cache
def installed(package: str, extra: str | None = None) -> Condition:
    """Requires an optional package for any value; see `require_package`."""
    return Condition(lambda value: None if is_installed(package) else not_installed(package, extra))
