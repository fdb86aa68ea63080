"""What a metric of an evaluation is: its name and direction, how it is shown, when it is computed, and from what.

Imports no torch: names and directions of metrics are looked up without it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from dlopt.basics.formats import format_number, format_percent

if TYPE_CHECKING:
    from torch import Tensor

Direction = Literal["min", "max"]
When = Literal["always", "tested", "requested"]
"""Computed in every evaluation; in tests, and on request (`evaluate.metrics`, `monitor`); on request only."""


def predicted_classes(outputs: "Tensor") -> "Tensor":
    """Returns the class with the largest of the outputs [..., K]: int64 [...]; -1, no class, where one is NaN."""
    largest, classes = outputs.max(-1)  # NaN where there is one
    return classes.masked_fill(largest.isnan(), -1)


@dataclass(frozen=True)
class Evaluated:
    """Samples with known outputs: of a batch, or of a whole split.

    Attributes:
        outputs: [N, ...] in fp32 or fp64.
        targets: as the loss takes them.
        size: number of classes, labels or values.
        values: maps outputs to probabilities [N, size], or values.
        predicted: maps outputs to the predicted classes.
        origin: a target [1, ...], the same on all ranks: sums of distances to it lose nothing by rounding.
        results: of what metrics and the report of a test compute from the whole split, see `Whole`.
    """

    outputs: "Tensor"
    targets: "Tensor"
    size: int
    values: "Callable[[Tensor], Tensor]"
    predicted: "Callable[[Tensor], Tensor]" = predicted_classes
    origin: "Tensor | None" = None
    results: "dict[Whole, Any]" = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def probabilities(self) -> "Tensor":
        return self.values(self.outputs)

    @property
    def exact_probabilities(self) -> "Tensor":
        """In float64: those of fp32 have many equal values near 0 and 1."""
        return self.values(self.outputs.double())

    @cached_property
    def predictions(self) -> "Tensor":
        """The predicted class: int64 [N]; -1, none, where an output is NaN."""
        return self.predicted(self.outputs)


@dataclass(frozen=True)
class Sum:
    """Numbers that are added up over samples, batches and ranks.

    `size`: how many, of a number of classes or values; `of`: those of a batch, which has at least one sample.
    """

    size: Callable[[int], int]
    of: "Callable[[Evaluated], Tensor]"


@dataclass(frozen=True)
class Whole:
    """What is computed from all samples of a split at once, which an evaluation then keeps in main memory."""

    of: Callable[[Evaluated], Any]

    def on(self, split: Evaluated) -> Any:
        """Returns what it computes from the split, once."""
        if self not in split.results:
            split.results[self] = self.of(split)
        return split.results[self]


@dataclass(frozen=True)
class Declaration:
    """A metric of an evaluation. All that shows, ranks, checks or documents metrics derives from these.

    Attributes:
        name: without the split.
        direction: "min" if smaller values are better.
        unit: "%" of fractions, which are shown in percent; of a loss "nats" or "bits".
        about: one line for the reference.
        when: see `When`.
        needs: from what `value` computes it, all of them `Sum`, or all of them `Whole`; (): `MetricSum` adds it up in
            every update.
        value: (*needs, names of the classes) -> the metric; if it is `by_class`, several by name: NAME/CLASS of each
            class, and those of `also`.
        also: further names of what `value` returns.
        least: number of classes that it needs.
        header: of its column in the table of epochs.
    """

    name: str
    direction: Direction
    unit: Literal["%", "nats", "bits", ""]
    about: str
    when: When = "requested"
    needs: Sequence[Sum | Whole] = ()
    value: Callable[..., float | Mapping[str, float]] | None = None
    by_class: bool = False
    also: tuple[str, ...] = ()
    least: int = 1
    header: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All names without a class: class_accuracy, worst_class_accuracy."""
        return (self.name, *self.also)

    def title(self, split: str) -> str:
        """Returns the header of its column in the table of epochs: val acc."""
        return self.header.format(split=split) or f"{split} {self.name}".replace("_", " ")

    def show(self, value: float | None) -> str:
        return format_percent(value) if self.unit == "%" else format_number(value)
