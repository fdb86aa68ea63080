"""Each sample has a value, or several."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dlopt.metrics import regression
from dlopt.metrics.declaration import Declaration
from dlopt.tasks.task import Task


@dataclass(frozen=True)
class Regression(Task):
    """Targets: float [B] or [B, K]. `outputs`: the number of values."""

    kind: ClassVar = "regression"
    title: ClassVar = "Regression"
    purpose: ClassVar = "values per target"
    metrics: ClassVar[Sequence[Declaration]] = regression.METRICS
