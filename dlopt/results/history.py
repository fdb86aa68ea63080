"""The evaluated epochs of a run in memory: one array per metric, 30 times smaller than a dict per epoch."""

import math
import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np


class History(Sequence[Mapping[str, float]]):
    """An immutable sequence of the lines of metrics.jsonl: dicts of finite numbers, which are made when they are read.

    Numbers are kept as float64. An integral value is an int in a column that has integers, such as `epoch`.
    """

    def __init__(self, lines: Iterable[Mapping[str, float]] = ()) -> None:
        self._columns: dict[str, array[float]] = {}
        self._integral: set[str] = set()
        self._length = 0
        for line in lines:
            for name, value in line.items():
                column = self._columns.get(name)
                if column is None:
                    column = self._columns[name] = array("d", [math.nan]) * self._length
                column.append(value)
                if type(value) is int:
                    self._integral.add(name)
            self._length += 1
            if len(line) < len(self._columns):
                for column in self._columns.values():
                    if len(column) < self._length:
                        column.append(math.nan)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> dict[str, float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, float]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        line = {name: column[index] for name, column in self._columns.items()}
        return {name: self._number(name, value) for name, value in line.items() if value == value}

    def __iter__(self) -> Iterator[dict[str, float]]:
        return (self[i] for i in range(self._length))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._length} lines: {', '.join(self._columns)}>"

    def _number(self, name: str, value: float) -> float:
        return int(value) if name in self._integral and value.is_integer() else value

    def values(self, name: str) -> Sequence[float]:
        """Returns a metric of all lines; NaN where it is missing."""
        return self._columns.get(name, array("d", [math.nan]) * self._length)

    def latest(self) -> dict[str, float]:
        """Returns the latest value of each metric."""
        present = {name: next(v for v in reversed(column) if v == v) for name, column in self._columns.items()}
        return {name: self._number(name, value) for name, value in present.items()}

    def column(self, name: str) -> "np.ndarray":
        """Returns a metric of all lines as an array; NaN where it is missing."""
        import numpy as np

        return np.array(self.values(name), dtype=float)


def columns(history: Sequence[Mapping[str, float]], names: Sequence[str]) -> "np.ndarray":
    """Returns metrics as columns [lines, names]; NaN where one is missing."""
    import numpy as np

    known = history if isinstance(history, History) else History(history)
    return np.stack([known.column(name) for name in names], 1)
