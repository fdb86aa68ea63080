"""The search space: converts Hydra's `interval()`, `range()`, `choice()` and `tag(log, ...)` for Optuna."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, RangeSweep, Sweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from dlopt.basics.errors import UserError
from dlopt.config.overrides import (
    Axis,
    is_equal,
    key_of,
    listed_values,
    parse_overrides,
    quoted_plain,
    refuse_several,
    value_of,
)

Value = str | int | float


@dataclass(frozen=True)
class Space:
    """The axes of a search, by name.

    Attributes:
        searched: distributions; choices are strings as on the command line, with all keys for zip(...).
        fixed: overrides of every job.
        axes: axes that are searched or have a condition, each after the axis that decides its condition.
    """

    searched: Mapping[str, BaseDistribution]
    fixed: tuple[str, ...]
    axes: Mapping[str, Axis] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The keys in which jobs may differ."""
        return [key for axis in self.axes.values() for key in axis.keys]

    def has(self, name: str, values: Mapping[str, Any]) -> bool:
        """Returns whether the job has the axis, by its values of the axes before."""
        return self.axes[name].applies(self.overrides(values))

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """Returns the overrides of a job; ignores values of axes that the job does not have."""
        lines = list(self.fixed)
        for name, axis in self.axes.items():
            if axis.applies(lines) and (name in values or name not in self.searched):
                lines += self._lines(name, values.get(name))
        return lines

    def _lines(self, name: str, value: Any) -> tuple[str, ...]:
        axis = self.axes[name]
        if axis.is_zip or name not in self.searched:
            rows = axis.rows()
            # A value that another process has written into the study may be none of the rows, and then is no key.
            return rows[0] if len(rows) == 1 else next((row for row in rows if _joined(row) == value), (str(value),))
        return (f"{axis.overrides[0].get_key_element()}={value}",)

    def label(self, values: Mapping[str, Any]) -> str:
        """Returns the overrides in which the job differs from others."""
        return " ".join(self.overrides(values)[len(self.fixed) :])

    def point(self, overrides: Mapping[str, Any]) -> dict[str, Value]:
        """Returns the values of the axes that the overrides set. Raises `UserError` for a point outside the space."""
        lines = [f"{key}={each if isinstance(each, str) else quoted_plain(each)}" for key, each in overrides.items()]
        refuse_several(parse_overrides(lines))
        values: dict[str, Value] = {}
        for name in self.searched:
            own = [line for line in lines if key_of(line) in self.axes[name].keys]
            if own and self.has(name, values):
                values[name] = self._value(name, own)
                lines = [line for line in lines if line not in own]
        if not lines:
            return values
        conditions = sorted({axis.when for axis in self.axes.values() if key_of(lines[0]) in axis.keys and axis.when})
        if conditions:
            raise UserError(f"{lines[0]}: only searched with {' or '.join(conditions)}, which the point does not set")
        searched = dict.fromkeys(key for name in self.searched for key in self.axes[name].keys)
        raise UserError(f"{lines[0]}: not a searched key; allowed: {', '.join(searched)}")

    def _value(self, name: str, lines: Sequence[str]) -> Value:
        """Returns the value of an axis that the overrides set. Raises `UserError` for one outside the space."""
        distribution = self.searched[name]
        if isinstance(distribution, CategoricalDistribution):
            for choice, row in zip(distribution.choices, self.axes[name].rows(), strict=True):
                if len(row) == len(lines) and all(any(is_equal(line, each) for line in lines) for each in row):
                    return str(choice)
        else:
            number = parse_overrides(lines)[0].value()
            if isinstance(number, int | float) and not isinstance(number, bool) and distribution._contains(number):
                if isinstance(distribution, FloatDistribution):
                    return float(number)
                if number == int(number):
                    return int(number)
        raise UserError(f"{' '.join(lines)}: outside the search space; allowed: {_describe(distribution)}")

    def describe(self) -> dict[str, str]:
        """Maps each axis to its distribution in Hydra's notation, for display, storage and comparison."""
        return {
            name: _describe(self.searched[name]) if name in self.searched else " ".join(map(value_of, axis.rows()[0]))
            for name, axis in self.axes.items()
        }

    def size(self) -> int | None:
        """Returns the number of points; None if an axis is continuous."""
        if any(self._options(name) is None for name in self.axes):
            return None
        return len(self.points())

    def points(self) -> list[dict[str, Value]]:
        """Returns all points of a space without continuous axes; the last axis changes fastest."""
        points: list[tuple[dict[str, Value], tuple[str, ...]]] = [({}, self.fixed)]
        for name, axis in self.axes.items():
            options = self._options(name) or []
            points = [
                (values | own, (*lines, *more))
                for values, lines in points
                for own, more in (options if axis.applies(lines) else [({}, ())])
            ]
        return [values for values, _ in points]

    def _options(self, name: str) -> list[tuple[dict[str, Value], tuple[str, ...]]] | None:
        """Returns the values of an axis, each with its overrides; None if they are continuous."""
        if name not in self.searched:
            return [({}, self._lines(name, None))]
        values = grid_values(self.searched[name])
        return None if values is None else [({name: value}, self._lines(name, value)) for value in values]


def parse_space(axes: Iterable[Axis]) -> Space:
    """Builds the space of the axes of a command line. Raises `UserError`."""
    axes = list(axes)
    searched = {axis.name: _distribution(axis) for axis in axes if axis.is_swept}
    fixed = [line for axis in axes if not axis.is_swept and not axis.when for line in axis.rows()[0]]
    if not searched:
        raise UserError(
            "hydra.sweeper.params: nothing to search; add for example "
            "'optimizer.lr=tag(log,interval(0.001,0.1))' or optimizer=sgd,adamw"
        )
    return Space(searched, tuple(fixed), {axis.name: axis for axis in axes if axis.is_swept or axis.when})


def _joined(row: Iterable[str]) -> str:
    return " ".join(row)


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.is_zip:
        return CategoricalDistribution(list(map(_joined, axis.rows())))
    [override] = axis.overrides
    key, value = str(override.get_key_element()), override.value()
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
