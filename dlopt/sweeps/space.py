"""The search space: converts Hydra's `interval()`, `range()`, `choice()` and `tag(log, ...)` for Optuna."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Sweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from dlopt.basics.errors import UserError
from dlopt.config.overrides import listed_values

Value = str | int | float


@dataclass(frozen=True)
class Space:
    """`searched`: key -> distribution; choices are strings as on the command line. `fixed`: overrides of every job."""

    searched: Mapping[str, BaseDistribution]
    fixed: tuple[str, ...]

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        return [*self.fixed, *(f"{key}={values[key]}" for key in self.searched)]

    def label(self, values: Mapping[str, Any]) -> str:
        """Returns the overrides in which the job differs from others."""
        return " ".join(self.overrides(values)[len(self.fixed) :])

    def describe(self) -> dict[str, str]:
        """Maps each key to its distribution in Hydra's notation, for display, storage and comparison."""
        return {key: _describe(distribution) for key, distribution in self.searched.items()}

    def size(self) -> int | None:
        """Returns the number of points; None if a key is continuous."""
        axes = [grid_values(distribution) for distribution in self.searched.values()]
        return None if None in axes else math.prod(len(axis or ()) for axis in axes)

    def points(self) -> list[dict[str, Value]]:
        """Returns all points of a space without continuous keys; the last key changes fastest."""
        axes: list[Any] = [grid_values(distribution) for distribution in self.searched.values()]
        return [dict(zip(self.searched, point, strict=True)) for point in product(*axes)]


def parse_space(overrides: Iterable[Override]) -> Space:
    """Builds the space of parsed overrides; of a key given twice the last wins. Raises `UserError`."""
    searched: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        searched.pop(key, None)
        fixed.pop(key, None)
        if override.is_sweep_override():
            searched[key] = _distribution(key, override)
        else:
            fixed[key] = f"{key}={override.get_value_element_as_str()}"
    if not searched:
        raise UserError(
            "hydra.sweeper.params: nothing to search; add for example "
            "'optimizer.lr=tag(log,interval(0.001,0.1))' or optimizer=sgd,adamw"
        )
    return Space(searched, tuple(fixed.values()))


def _distribution(key: str, override: Override) -> BaseDistribution:
    value = override.value()
    tags = value.tags if isinstance(value, Sweep) else set()
    if unknown := sorted(tags - {"log"}):
        raise UserError(f"{key}: unknown tag({unknown[0]}, ...); allowed: tag(log, interval(a,b))")
    if isinstance(value, IntervalSweep):
        return _interval(key, value)
    if tags:
        raise UserError(f"{key}: tag(log, ...) requires interval(a,b), not a list or range")
    if isinstance(value, RangeSweep) and not value.shuffle:
        return _range(key, value)
    choices = listed_values(override)
    if not choices:
        raise UserError(f"{key}: the list of values is empty")
    return CategoricalDistribution(choices)


def _interval(key: str, sweep: IntervalSweep) -> BaseDistribution:
    low, high, is_log = sweep.start, sweep.end, bool(sweep.tags)
    assert low is not None and high is not None
    if low > high or (is_log and low <= 0):
        required = "0 < a <= b" if is_log else "a <= b"
        raise UserError(f"{key}=interval({low},{high}): interval(a,b) requires {required}")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


def _range(key: str, sweep: RangeSweep) -> BaseDistribution:
    # Hydra's range excludes its end, Optuna's distributions include theirs.
    ends = (sweep.start, sweep.stop, sweep.step)
    first, stop, step = (Decimal(str(end)) for end in ends)  # in decimals: 0.1 * 3 would be 0.30000000000000004
    if (stop - first) * step <= 0:
        raise UserError(f"{key}=range({sweep.start},{sweep.stop},{sweep.step}): the range is empty")
    last = first + (math.ceil((stop - first) / step) - 1) * step
    low, high = sorted((first, last))
    if all(isinstance(end, int) for end in ends):
        return IntDistribution(int(low), int(high), step=abs(int(step)))
    return FloatDistribution(float(low), float(high), step=abs(float(step)))


def grid_values(distribution: BaseDistribution) -> list[Value] | None:
    """Returns all values, in order; None if they are continuous."""
    if isinstance(distribution, CategoricalDistribution):
        return [str(choice) for choice in distribution.choices]
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        first, last, step = (Decimal(str(x)) for x in (distribution.low, distribution.high, distribution.step))
        return [float(first + i * step) for i in range(int((last - first) / step) + 1)]  # see `_range`
    return None


def _describe(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return f"choice({','.join(str(choice) for choice in distribution.choices)})"
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None and not (isinstance(distribution, IntDistribution) and step == 1):
        return f"from {low} to {high} in steps of {step}"
    interval = f"interval({low},{high})"
    return f"tag(log,{interval})" if distribution.log else interval
