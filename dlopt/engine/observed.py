"""Updates that somebody looks at: diagnostics and the profiler hang in here, and the loop knows nothing of them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from torch import Tensor

from dlopt.engine.metrics import Sums
from dlopt.engine.step import Update


class Observer(Protocol):
    def around(self, inputs: Tensor, targets: Tensor, step: int) -> AbstractContextManager[None] | None:
        """What encloses update `step` (from 0) on this batch; None: this update is not looked at."""
        ...


class ObservedUpdate(Update):
    """An update with `observers`, which must not change what it computes."""

    observers: Sequence[Observer] = ()

    def __call__(self, inputs: Tensor, targets: Tensor, step: int, sums: Sums) -> None:
        contexts = [context for each in self.observers if (context := each.around(inputs, targets, step)) is not None]
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            super().__call__(inputs, targets, step, sums)
