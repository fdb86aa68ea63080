"""Accumulates the inputs of an evaluation's metrics over its batches and over all ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dlopt.metrics.declaration import Declaration, Evaluated, Sum, Whole
from dlopt.metrics.outputs import KeptOutputs, Ranks
from dlopt.metrics.sums import Reduce

Part = Callable[[Tensor, Tensor], Evaluated]
"""(outputs, targets) of samples -> what the metrics read of them."""


class Accumulator(Protocol):
    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds this rank's samples of a batch, at least one."""
        ...

    def means(self, reduce: Reduce | None) -> Mapping[str, float]:
        """Returns the metrics of all samples so far, on all ranks, by name; `reduce`: see `MetricSum`."""
        ...


@dataclass
class Sums:
    """Accumulates metrics that are functions of sums over samples.

    `size`: number of classes or values; `names`: of the classes, if a metric has a value for each.
    """

    metrics: Sequence[Declaration]
    part: Part
    size: int
    names: Sequence[str] = ()
    _sums: Tensor | None = field(default=None, init=False)

    @property
    def _needs(self) -> list[Sum]:
        return _distinct(self.metrics, Sum)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.device.type == "mps":  # which has no float64
            outputs, targets = outputs.cpu(), targets.cpu()
        part = self.part(outputs, targets)
        columns = [need.of(part) for need in self._needs]
        dtype = next((each.dtype for each in columns if each.is_floating_point()), columns[0].dtype)
        sums = torch.cat([each.to(dtype) for each in columns])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        sizes = [need.size(self.size) for need in self._needs]
        # One transfer from the device per evaluation. `reduce` is a collective: a rank without samples calls it, too.
        local = [0.0] * sum(sizes) if self._sums is None else self._sums.tolist()  # zeros: this rank had no samples
        sums = torch.tensor(local if reduce is None else list(reduce(local)), dtype=torch.float64)
        found = dict(zip(map(id, self._needs), sums.split(sizes), strict=True))
        return _values(self.metrics, found, self.names)


class Wholes(KeptOutputs):
    """Keeps the outputs and targets of an evaluation in main memory, for metrics that need all of them at once.

    `split`: all samples, after `means`; None on ranks > 0.
    """

    split: Evaluated | None = None

    def __init__(self, metrics: Sequence[Declaration], part: Part, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._metrics, self._part = metrics, part

    def means(self, _: Reduce | None = None) -> Mapping[str, float]:
        samples = self.gathered()
        result: dict[str, float] = {}
        if samples is not None:
            split = self.split = self._part(*samples)
            result = _values(self._metrics, {id(need): need.on(split) for need in _distinct(self._metrics, Whole)})
        # All ranks need the numbers: the best epoch and the stopping rule depend on them.
        return self._ranks.broadcast(result)


def accumulators(
    metrics: Sequence[Declaration], part: Part, size: int, names: Sequence[str], ranks: Ranks, *, keeps: bool = False
) -> list[Sums | Wholes]:
    """Returns what accumulates the metrics; see `Sums` and `Wholes`, which is the last one. `keeps`: it is needed."""
    of_sums, of_wholes = ([each for each in metrics if each.needs and isinstance(each.needs[0], kind)]
                          for kind in (Sum, Whole))  # fmt: skip
    found: list[Sums | Wholes] = [Sums(of_sums, part, size, names)] if of_sums else []
    return [*found, *([Wholes(of_wholes, part, ranks)] if of_wholes or keeps else [])]


def _distinct(metrics: Sequence[Declaration], kind: type) -> list[Any]:
    needs = {id(need): need for metric in metrics for need in metric.needs}
    return [need for need in needs.values() if isinstance(need, kind)]


def _values(metrics: Sequence[Declaration], found: Mapping[int, Any], names: Sequence[str] = ()) -> dict[str, float]:
    result: dict[str, float] = {}
    for metric in metrics:
        assert metric.value is not None
        value = metric.value(*(found[id(need)] for need in metric.needs), names)
        result |= value if isinstance(value, Mapping) else {metric.name: value}
    return result
