"""What a schedule knows of its run, the pieces that curves are made of, and the warmup before any schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dlopt.errors import UserError
from dlopt.ranges import Natural, NonNegative, Probability

Factor = Callable[[float], float]


@dataclass(frozen=True)
class Horizon:
    """What a schedule knows of its run: `start`, the update at which the warmup has ended; `steps`, all updates of the
    schedule; `steps_per_epoch`."""

    start: int
    steps: int
    steps_per_epoch: float


def one_unit(key: str, epochs: object, steps: object) -> None:
    if epochs is not None and steps is not None:
        raise UserError(
            f"schedule.{key}_epochs={epochs} and schedule.{key}_steps={steps}: two lengths for one thing; "
            f"give one of them and leave the other null"
        )


def length_of(key: str, epochs: float | None, steps: int | None, horizon: Horizon, otherwise: float) -> float:
    """A length in steps; `otherwise` when the user gave none."""
    one_unit(key, epochs, steps)
    if steps is not None:
        return steps
    return otherwise if epochs is None else epochs * horizon.steps_per_epoch


def progress(t: float, start: float, length: float) -> float:
    """How much of [start, start + length] lies behind t: 0..1."""
    if t <= start:
        return 0.0
    return (t - start) / length if t < start + length else 1.0


def half_cosine(x: float) -> float:
    """1 at x = 0, 0 at x = 1; SGDR, Loshchilov & Hutter 2017, eq. 5."""
    return 0.5 * (1.0 + math.cos(math.pi * x))


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """The keys that every schedule has (conf/schedule/_warmup.yaml): a warmup before it."""

    warmup_epochs: NonNegative | None
    warmup_steps: Natural | None
    warmup_fraction: Probability
    warmup_start: Probability
    warmup_shape: Literal["linear", "constant"]

    def length(self, steps: int, steps_per_epoch: float) -> int:
        """Steps of warmup. Raises UserError when it is longer than the training."""
        horizon = Horizon(0, steps, steps_per_epoch)
        length = int(length_of("warmup", self.warmup_epochs, self.warmup_steps, horizon, self.warmup_fraction * steps))
        if length and self.warmup_shape == "constant" and self.warmup_start == 0:
            raise UserError(
                "schedule.warmup_start=0.0: with schedule.warmup_shape=constant the warmup would learn nothing; "
                "allowed: a share of optimizer.lr above 0"
            )
        if length > steps:
            given = f"epochs={self.warmup_epochs:g}" if self.warmup_steps is None else f"steps={self.warmup_steps}"
            raise UserError(
                f"schedule.warmup_{given}: a warmup of {length} steps is longer than the training ({steps} steps); "
                f"shorten it or raise epochs"
            )
        return length


class WarmedUp:
    """`component` under a ramp over the first `length` updates.

    The linear ramp is start + (1 - start) (t + 1) / (length + 1): it stands at `start` before the first update, so no
    update is lost to a learning rate of zero, and it reaches 1 at t = length, where the component takes over. The
    constant one stays at `start` until then.
    """

    def __init__(self, component: Factor, length: int, start: float, shape: Literal["linear", "constant"]) -> None:
        self.component, self.length, self.start = component, length, start
        self._slope = (1.0 - start) / (length + 1) if shape == "linear" else 0.0

    def __call__(self, t: float) -> float:
        if t >= self.length:
            return self.component(t)
        return (self.start + self._slope * (t + 1)) * self.component(t)


def build(factory: Callable[..., Factor], warmup: Warmup, *, steps: int, steps_per_epoch: float) -> Factor:
    """The schedule of a run of `steps` updates: `factory` is a choice with all its keys bound but `horizon`."""
    length = warmup.length(steps, steps_per_epoch)
    component = factory(horizon=Horizon(length, steps, steps_per_epoch))
    return WarmedUp(component, length, warmup.warmup_start, warmup.warmup_shape) if length else component
