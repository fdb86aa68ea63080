"""`Horizon` (the lengths of a run), the functions that curves are composed of, and the warmup of any schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dlopt.basics.calls import can_call
from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Natural, NonNegative, Probability

Factor = Callable[[float], float]


@dataclass(frozen=True)
class Horizon:
    """Lengths of a run. `start`: first update after the warmup; `steps`: total updates, warmup included."""

    start: int
    steps: int
    steps_per_epoch: float


def one_unit(key: str, epochs: object, steps: object) -> None:
    """Raises `UserError` if a length is given in both units."""
    if epochs is not None and steps is not None:
        raise UserError(
            f"schedule.{key}_epochs={epochs} and schedule.{key}_steps={steps}: only one of them may be set; "
            f"set the other to null"
        )


def whole(length: float) -> float:
    """Returns the length, rounded if it is an integer up to floating-point error: 0.07 * 100 is 7.000000000000001."""
    nearest = round(length) if math.isfinite(length) else length
    return nearest if abs(length - nearest) <= 1e-12 * abs(length) else length


def length_of(key: str, epochs: float | None, steps: int | None, horizon: Horizon, default: float) -> float:
    """Returns a length in steps. Raises `UserError` if it is given in both units."""
    one_unit(key, epochs, steps)
    if steps is not None:
        return steps
    return whole(default if epochs is None else epochs * horizon.steps_per_epoch)


def progress(t: float, start: float, length: float) -> float:
    """Returns the fraction of [start, start + length] that t has passed: 0..1."""
    if t <= start:
        return 0.0
    return (t - start) / length if t < start + length else 1.0


def half_cosine(x: float) -> float:
    """Falls from 1 at x = 0 to 0 at x = 1; SGDR, Loshchilov & Hutter 2017, eq. 5."""
    return 0.5 * (1.0 + math.cos(math.pi * x))


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """The keys of the warmup, which every schedule has (conf/schedule/_warmup.yaml)."""

    warmup_epochs: NonNegative | None
    warmup_steps: Natural | None
    warmup_fraction: Probability
    warmup_start: Probability
    warmup_shape: Literal["linear", "constant"]

    def length(self, steps: int, steps_per_epoch: float) -> int:
        """Returns the steps of the warmup. Raises `UserError` if it is longer than the training."""
        horizon = Horizon(0, steps, steps_per_epoch)
        length = int(length_of("warmup", self.warmup_epochs, self.warmup_steps, horizon, self.warmup_fraction * steps))
        if length and self.warmup_shape == "constant" and self.warmup_start == 0:
            raise UserError(
                "schedule.warmup_start=0.0: schedule.warmup_shape=constant needs a learning rate; "
                "set a fraction of optimizer.lr above 0"
            )
        if length > steps:
            key = f"epochs={self.warmup_epochs:g}" if self.warmup_steps is None else f"steps={self.warmup_steps}"
            raise UserError(
                f"schedule.warmup_{key}: the warmup of {length} steps is longer than the training ({steps} steps); "
                f"reduce it or increase epochs"
            )
        return length


def momentum_of(factor: Factor) -> Factor | None:
    """Returns the momentum that a schedule sets, as a function of the update t; None if it sets none."""
    component = getattr(factor, "component", factor)
    momentum: Factor | None = getattr(component, "momentum", None)
    return momentum if callable(momentum) and getattr(component, "cycle_momentum", True) else None


class WarmedUp:
    """A schedule multiplied by a warmup factor over the first `length` updates.

    linear: from `start` at the first update, t = 0, to 1 at t = length, the first update after the warmup (torch's
    LinearLR, timm). With start = 0 that would waste an update on a learning rate of zero: then the factor is
    (t + 1) / (length + 1), as in nanoGPT. constant: `start` for t < length.
    """

    def __init__(self, component: Factor, length: int, start: float, shape: Literal["linear", "constant"]) -> None:
        self.component, self.length, self.start = component, length, start
        # Without a start the line begins one update earlier, outside the run.
        self._lead = 1 if start == 0 else 0
        self._slope = (1.0 - start) / (length + self._lead) if shape == "linear" else 0.0

    def __call__(self, t: float) -> float:
        if t >= self.length:
            return self.component(t)
        return (self.start + self._slope * (t + self._lead)) * self.component(t)


def build(factory: Callable[..., Factor], warmup: Warmup, *, steps: int, steps_per_epoch: float) -> Factor:
    """Builds the schedule of a run of `steps` updates. `factory`: a choice with all arguments bound but `horizon`.

    Raises `UserError` if the choice returns no function of t, or one that returns no number.
    """
    length = warmup.length(steps, steps_per_epoch)
    component = factory(horizon=Horizon(length, steps, steps_per_epoch))
    for function in (component, momentum_of(component) or component):
        if not can_call(function, 1) or not hasattr(function(0.0), "__float__"):
            raise UserError(
                f"schedule: returns {type(component).__name__}; must return a function from the update t, its only "
                "argument, to a factor of the learning rate, a number (momentum(t): to the momentum)"
            )
    return WarmedUp(component, length, warmup.warmup_start, warmup.warmup_shape) if length else component
