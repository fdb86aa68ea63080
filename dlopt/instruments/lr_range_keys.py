"""Keys of the learning-rate range test; without torch, because the help of `dlopt find-lr` shows them."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from dlopt.basics.ranges import Fraction, Positive


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """Keys of `dlopt find-lr`; `optimizer.lr=auto` uses the defaults."""

    min_lr: Annotated[Positive, "X: first learning rate"] = 1e-6
    max_lr: Annotated[Positive, "X: last learning rate"] = 10.0
    updates: Annotated[int, Ge(10), "N: number of updates"] = 100
    smoothing: Annotated[Fraction, "X: weight of the past in the exponential moving average of the losses"] = 0.9
    diverge: Annotated[float, Gt(1), "X: stop when the smoothed loss exceeds X times its minimum"] = 4.0

    def rate(self, update: float) -> float:
        """Returns the rate of update 0 .. updates - 1, evenly spaced on a logarithmic scale."""
        fraction = update / max(self.updates - 1, 1)
        return self.min_lr * (self.max_lr / self.min_lr) ** fraction
