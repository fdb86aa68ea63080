"""`Horizon` (the lengths of a run), functions that curves are composed of, the warmup, and `Schedule`: the contract."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

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


@runtime_checkable
class FollowsMetrics(Protocol):
    """A schedule whose factor depends on evaluations, and which therefore has a state, for the checkpoint."""

    def update(self, metrics: Mapping[str, float]) -> None:
        """Receives the metrics of an evaluation, which are equal on all ranks."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Schedule:
    """What a choice sets. All functions but `follows` are pure functions of the update t, from 0.

    Attributes:
        factor: of the peak learning rate in update t.
        momentum: in update t, or betas[0]; None to leave it as it is.
        requires_momentum: refuse an optimizer without momentum, and set one of 0, too.
        ended_cycle: the number, from 1, of the cycle whose last update is t; None if t is not the last of one.
        restarts: updates at which another cycle starts.
        follows: the choice, if it follows metrics.
    """

    factor: Factor
    momentum: Factor | None = None
    requires_momentum: bool = True
    ended_cycle: Callable[[int], int | None] | None = None
    restarts: Sequence[float] = ()
    follows: FollowsMetrics | None = None

    @classmethod
    def of(cls, choice: Any) -> "Schedule":
        """Returns the schedule of a choice: a function of t, or an object that also has other members."""
        if isinstance(choice, Schedule):
            return choice
        momentum, cycles = getattr(choice, "momentum", None), getattr(choice, "cycle_momentum", True)
        return cls(
            choice,
            momentum if callable(momentum) and cycles else None,
            requires_momentum=cycles != "auto",
            ended_cycle=getattr(choice, "ended_cycle", None),
            restarts=getattr(choice, "restarts", ()),
            follows=choice if hasattr(choice, "update") or hasattr(choice, "state_dict") else None,
        )

    def __call__(self, t: float) -> float:
        return self.factor(t)


def warmed_up(factor: Factor, length: int, start: float, shape: Literal["linear", "constant"]) -> Factor:
    """Returns a factor multiplied by that of a warmup over the first `length` updates.

    linear: from `start` at the first update, t = 0, to 1 at t = length, the first update after the warmup (torch's
    LinearLR, timm). With start = 0 that would waste an update on a learning rate of zero: then the factor is
    (t + 1) / (length + 1), as in nanoGPT. constant: `start` for t < length.
    """
    lead = 1 if start == 0 else 0  # without a start the line begins one update earlier, outside the run
    slope = (1.0 - start) / (length + lead) if shape == "linear" else 0.0
    return lambda t: factor(t) if t >= length else (start + slope * (t + lead)) * factor(t)


def build(factory: Callable[..., Factor], warmup: Warmup, *, steps: int, steps_per_epoch: float) -> Schedule:
    """Builds the schedule of a run of `steps` updates. `factory`: a choice with all arguments bound but `horizon`.

    Raises `UserError` if the choice does not return what `Schedule` requires.
    """
    length = warmup.length(steps, steps_per_epoch)
    schedule = Schedule.of(factory(horizon=Horizon(length, steps, steps_per_epoch)))
    found, follows = type(schedule.factor).__name__, schedule.follows
    for function in (schedule.factor, schedule.momentum or schedule.factor):
        if not can_call(function, 1) or not hasattr(function(0.0), "__float__"):
            raise UserError(
                f"schedule: returns {found}; must return a function from the update t, its only "
                "argument, to a factor of the learning rate, a number (momentum(t): to the momentum)"
            )
    if schedule.ended_cycle is not None and not can_call(schedule.ended_cycle, 1):
        raise UserError(f"schedule: {found}.ended_cycle must be callable as ended_cycle(t)")
    if follows is not None and not (isinstance(follows, FollowsMetrics) and can_call(follows.update, 1)):
        raise UserError(f"schedule: {found} must have update(metrics), state_dict() and load_state_dict(state)")
    if not length:
        return schedule
    return replace(schedule, factor=warmed_up(schedule.factor, length, warmup.warmup_start, warmup.warmup_shape))
