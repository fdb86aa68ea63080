"""Learning-rate schedules: pure functions from the step (update t, from 0) to a factor of the peak learning rate.

A choice is a factory that takes the `Horizon` of the run and returns the function. Three rules hold for all of them:
- a linear warmup can stand before any schedule (`Warmup`); it multiplies what the schedule says;
- `step` and `multistep` count from the start of training, as papers state their milestones; curves (cosine,
  exponential, ...) begin where the warmup has ended. Past the end of the run the factor stays where it arrived;
- a length is given in epochs or in steps, the unit in the key's name. Where neither is given it is a share of the run,
  so that the defaults are valid for every length of run.

`plateau` alone depends on what happened: it is an object with `update`, `state_dict` and `load_state_dict`.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval

from dlopt.errors import UserError
from dlopt.ranges import Count, Natural, NonNegative, Positive, PositiveShare, Probability, Share

Factor = Callable[[int], float]
Lengths = tuple[Positive, ...]
AtLeastOne = Annotated[float, Ge(1)]
Open = Annotated[float, Interval(gt=0, lt=1)]


@dataclass(frozen=True)
class Horizon:
    """What a schedule knows of its run: `start`, the update at which the warmup has ended; `steps`, all updates of the
    schedule; `steps_per_epoch`."""

    start: int
    steps: int
    steps_per_epoch: float


def _one_unit(key: str, epochs: object, steps: object) -> None:
    if epochs is not None and steps is not None:
        raise UserError(
            f"schedule.{key}_epochs={epochs} and schedule.{key}_steps={steps}: two lengths for one thing; "
            f"give one of them and leave the other null"
        )


def _length(key: str, epochs: float | None, steps: int | None, horizon: Horizon, otherwise: float) -> float:
    """A length in steps; `otherwise` when the user gave none."""
    _one_unit(key, epochs, steps)
    if steps is not None:
        return steps
    return otherwise if epochs is None else epochs * horizon.steps_per_epoch


def _progress(t: float, start: float, length: float) -> float:
    """How much of [start, start + length] lies behind t: 0..1."""
    if t <= start:
        return 0.0
    return (t - start) / length if t < start + length else 1.0


def _half_cosine(x: float) -> float:
    """1 at x = 0, 0 at x = 1; SGDR, Loshchilov & Hutter 2017, eq. 5."""
    return 0.5 * (1.0 + math.cos(math.pi * x))


def constant(*, horizon: Horizon) -> Factor:
    return lambda t: 1.0


def step(
    *,
    gamma: PositiveShare,
    every_epochs: Positive | None,
    every_steps: Count | None,
    every_share: PositiveShare,
    horizon: Horizon,
) -> Factor:
    """gamma^floor(t / every), counted from the start of training; torch's StepLR."""
    every = _length("every", every_epochs, every_steps, horizon, every_share * horizon.steps)
    return lambda t: gamma ** (min(t, horizon.steps) // every)


def multistep(
    *,
    gamma: PositiveShare,
    milestones_epochs: Lengths | None,
    milestones_steps: tuple[Count, ...] | None,
    milestones_share: tuple[PositiveShare, ...],
    horizon: Horizon,
) -> Factor:
    """gamma^(number of milestones reached), counted from the start of training; torch's MultiStepLR."""
    _one_unit("milestones", milestones_epochs, milestones_steps)
    milestones: list[float]
    if milestones_steps is not None:
        milestones = [float(m) for m in milestones_steps]
    elif milestones_epochs is not None:
        milestones = [m * horizon.steps_per_epoch for m in milestones_epochs]
    else:
        milestones = [m * horizon.steps for m in milestones_share]
    if any(b <= a for a, b in itertools.pairwise(milestones)):
        raise UserError(
            f"schedule.milestones_*={list(milestones_steps or milestones_epochs or milestones_share)}: "
            f"milestones must increase"
        )
    return lambda t: gamma ** bisect_right(milestones, min(t, horizon.steps))


def exponential(*, k: NonNegative, unit: Literal["epochs", "steps"], horizon: Horizon) -> Factor:
    """exp(-k t), t in epochs (fractions included) or in steps since the warmup."""
    rate = k / horizon.steps_per_epoch if unit == "epochs" else k
    return lambda t: math.exp(-rate * max(min(t, horizon.steps) - horizon.start, 0))


def time_decay(*, decay: NonNegative, unit: Literal["epochs", "steps"], horizon: Horizon) -> Factor:
    """1 / (1 + decay t), t in epochs (fractions included) or in steps since the warmup. The peak is multiplied once; it
    does not compound from step to step."""
    rate = decay / horizon.steps_per_epoch if unit == "epochs" else decay
    return lambda t: 1.0 / (1.0 + rate * max(min(t, horizon.steps) - horizon.start, 0))


def cosine(*, final: Probability, decay_epochs: Positive | None, decay_steps: Count | None, horizon: Horizon) -> Factor:
    """Half a cosine wave from 1 to `final`, over the rest of the run or the given length; torch's CosineAnnealingLR."""
    length = _length("decay", decay_epochs, decay_steps, horizon, horizon.steps - horizon.start)
    return lambda t: final + (1.0 - final) * _half_cosine(_progress(t, horizon.start, length))


def polynomial(
    *,
    power: Positive,
    final: Probability,
    decay_epochs: Positive | None,
    decay_steps: Count | None,
    horizon: Horizon,
) -> Factor:
    """final + (1 - final) (1 - x)^power, x = 0..1 over the rest of the run or the given length; PolynomialLR."""
    length = _length("decay", decay_epochs, decay_steps, horizon, horizon.steps - horizon.start)
    return lambda t: final + (1.0 - final) * (1.0 - _progress(t, horizon.start, length)) ** power


def linear(*, final: Probability, decay_epochs: Positive | None, decay_steps: Count | None, horizon: Horizon) -> Factor:
    """A straight line from 1 to `final`, over the rest of the run unless a length is given."""
    return polynomial(power=1.0, final=final, decay_epochs=decay_epochs, decay_steps=decay_steps, horizon=horizon)


def wsd(
    *,
    decay_epochs: Positive | None,
    decay_steps: Count | None,
    decay_share: PositiveShare,
    final: Probability,
    shape: Literal["linear", "cosine", "sqrt"],
    horizon: Horizon,
) -> Factor:
    """Warmup (the common keys), stable, decay: 1 until the decay, which ends with the run (Hu et al. 2024, MiniCPM).

    `sqrt` is 1 - sqrt(x), which Hagele et al. 2024 found the best shape.
    """
    rest = horizon.steps - horizon.start
    length = _length("decay", decay_epochs, decay_steps, horizon, decay_share * rest)
    if length > rest:
        raise UserError(
            f"schedule=wsd: a decay of {length:g} steps does not fit into the {rest} steps after the warmup; shorten "
            f"schedule.decay_epochs or schedule.decay_steps"
        )
    curves: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1.0 - x,
        "cosine": _half_cosine,
        "sqrt": lambda x: 1.0 - math.sqrt(x),
    }
    curve, begin = curves[shape], horizon.steps - length
    return lambda t: final + (1.0 - final) * curve(_progress(t, begin, length))


class Cycles:
    """Cycles of growing length between the warmup and the end of the run.

    The end of the run belongs to the cycle that arrives there: no restart falls on the step after the last.
    """

    def __init__(
        self, horizon: Horizon, epochs: float | None, steps: int | None, growth: float, cycles: int
    ) -> None:
        rest = horizon.steps - horizon.start
        length = _length("T_0", epochs, steps, horizon, rest / sum(growth**i for i in range(cycles)))
        self.steps = horizon.steps
        self.begins, self.lengths = [float(horizon.start)], [length]
        while self.begins[-1] + self.lengths[-1] < horizon.steps * (1 - 1e-12):
            self.begins.append(self.begins[-1] + self.lengths[-1])
            self.lengths.append(self.lengths[-1] * growth)

    def locate(self, t: int) -> tuple[int, float, float]:
        """(index of the cycle, steps since its beginning, its length in steps)."""
        now = min(t, self.steps)
        i = max(bisect_right(self.begins, now) - 1, 0)
        return i, max(now - self.begins[i], 0.0), self.lengths[i]

    def ended(self, t: int) -> int | None:
        """The number, from 1, of the cycle of which update t is the last."""
        i, since, period = self.locate(t)
        return i + 1 if t < self.steps and since + 1 >= period * (1 - 1e-12) else None


class Restarts:
    """A factor that depends on where in which cycle a step is."""

    def __init__(self, cycles: Cycles, factor: Callable[[int, float, float], float]) -> None:
        self.ended_cycle = cycles.ended
        self._locate = cycles.locate
        self._factor = factor

    def __call__(self, t: int) -> float:
        return self._factor(*self._locate(t))


def cosine_restarts(
    *,
    T_0_epochs: Positive | None,
    T_0_steps: Count | None,
    cycles: Annotated[int, Interval(ge=1, le=50)],
    T_mult: Annotated[float, Interval(ge=1, le=10)],
    eta_min: Probability,
    peak_factor: PositiveShare,
    eta_min_factor: PositiveShare,
    horizon: Horizon,
) -> Factor:
    """SGDR (Loshchilov & Hutter 2017), annealed every step; torch's CosineAnnealingWarmRestarts.

    In cycle i (from 0), of T_0 T_mult^i steps, the factor falls from peak_factor^i to eta_min eta_min_factor^i. Without
    T_0 the run is divided into `cycles` cycles, so that it ends at a minimum.
    """
    return cosine_warmup_restarts(
        T_0_epochs=T_0_epochs,
        T_0_steps=T_0_steps,
        cycles=cycles,
        T_mult=T_mult,
        eta_min=eta_min,
        peak_factor=peak_factor,
        eta_min_factor=eta_min_factor,
        cycle_warmup_epochs=None,
        cycle_warmup_steps=None,
        cycle_warmup_share=0.0,
        horizon=horizon,
    )


def cosine_warmup_restarts(
    *,
    T_0_epochs: Positive | None,
    T_0_steps: Count | None,
    cycles: Annotated[int, Interval(ge=1, le=50)],
    T_mult: Annotated[float, Interval(ge=1, le=10)],
    eta_min: Probability,
    peak_factor: PositiveShare,
    eta_min_factor: PositiveShare,
    cycle_warmup_epochs: NonNegative | None,
    cycle_warmup_steps: Natural | None,
    cycle_warmup_share: Share,
    horizon: Horizon,
) -> Factor:
    """`cosine_restarts` in which every cycle begins with a linear warmup from its minimum to its peak, not a jump.

    The warmup is a share of each cycle, or of one length for all.
    """
    periods = Cycles(horizon, T_0_epochs, T_0_steps, T_mult, cycles)
    _one_unit("cycle_warmup", cycle_warmup_epochs, cycle_warmup_steps)
    fixed = cycle_warmup_epochs is not None or cycle_warmup_steps is not None
    length = _length("cycle_warmup", cycle_warmup_epochs, cycle_warmup_steps, horizon, 0.0)
    shortest = periods.lengths[0]
    if fixed and length >= shortest > 0:
        raise UserError(
            f"schedule=cosine_warmup_restarts: a warmup of {length:g} steps leaves nothing of the first cycle "
            f"({shortest:g} steps); shorten schedule.cycle_warmup_* or lengthen schedule.T_0_*"
        )

    def factor(i: int, since: float, period: float) -> float:
        high = peak_factor**i
        low = min(eta_min * eta_min_factor**i, high)
        warm = length if fixed else cycle_warmup_share * period
        if since < warm:
            return low + (high - low) * (since + 1) / (warm + 1)  # as in WarmedUp, no update at zero
        return low + (high - low) * _half_cosine(_progress(since, warm, period - warm))

    return Restarts(periods, factor)


class OneCycle:
    """Up from peak / div_factor to the peak and down to peak / (div_factor final_div_factor): Smith & Topin 2018;
    torch's OneCycleLR, step by step. `momentum(t)` runs the other way; `Scheduler` sets it as `momentum` or `betas[0]`.
    """

    def __init__(
        self,
        *,
        pct_start: Open,
        div_factor: AtLeastOne,
        final_div_factor: AtLeastOne,
        anneal: Literal["cosine", "linear"],
        three_phase: bool,
        cycle_momentum: bool | Literal["auto"],
        base_momentum: Share,
        max_momentum: Share,
        horizon: Horizon,
    ) -> None:
        if base_momentum > max_momentum:
            raise UserError(
                f"schedule.base_momentum={base_momentum}: is above schedule.max_momentum={max_momentum}; "
                f"the base is the lower end"
            )
        self.start = horizon.start
        self.momentum_wanted = cycle_momentum
        self._anneal = _half_cosine if anneal == "cosine" else lambda x: 1.0 - x
        steps = horizon.steps - horizon.start
        low, last = 1.0 / div_factor, 1.0 / (div_factor * final_div_factor)
        up = pct_start * steps - 1
        # (last step of the phase, factor at its beginning and its end, momentum likewise)
        self._phases = [(up, low, 1.0, max_momentum, base_momentum)]
        if three_phase:
            self._phases.append((2 * pct_start * steps - 2, 1.0, low, base_momentum, max_momentum))
            self._phases.append((steps - 1, low, last, max_momentum, max_momentum))
        else:
            self._phases.append((steps - 1, 1.0, last, base_momentum, max_momentum))

    def _value(self, t: int, which: int) -> float:
        now, begin = max(t - self.start, 0), 0.0
        for i, phase in enumerate(self._phases):
            if now <= phase[0] or i == len(self._phases) - 1:
                break
            begin = max(phase[0], 0.0)
        a, b = phase[which], phase[which + 1]
        return b + (a - b) * self._anneal(_progress(now, begin, phase[0] - begin))

    def __call__(self, t: int) -> float:
        return self._value(t, 1)

    def momentum(self, t: int) -> float:
        return self._value(t, 3)


class Plateau:
    """The factor is multiplied by `factor` when a validation figure has not improved for more than `patience`
    evaluations; torch's ReduceLROnPlateau. A figure that is not a number counts as no improvement.
    """

    def __init__(
        self,
        *,
        monitor: str,
        mode: Literal["auto", "min", "max"],
        factor: Open,
        patience: Natural,
        threshold: NonNegative,
        threshold_mode: Literal["rel", "abs"],
        cooldown: Natural,
        min_factor: Probability,
        horizon: Horizon,
    ) -> None:
        self.monitor = monitor
        self._sign = -1.0 if mode == "max" or (mode == "auto" and "accuracy" in monitor) else 1.0
        self._reduction, self._patience, self._cooldown, self._least = factor, patience, cooldown, min_factor
        self._threshold, self._relative = threshold, threshold_mode == "rel"
        self.value, self.best, self.bad, self.resting = 1.0, math.inf, 0, 0

    def __call__(self, t: int) -> float:
        return self.value

    def update(self, metrics: Mapping[str, float]) -> None:
        """Takes the figures of one evaluation. Raises UserError when the monitored one is not among them."""
        if self.monitor not in metrics:
            names = ", ".join(sorted(metrics)) or "none"
            raise UserError(f"schedule.monitor={self.monitor}: no evaluation logs it; allowed: {names}")
        figure = self._sign * metrics[self.monitor]
        margin = self._threshold * (abs(self.best) if self._relative else 1.0) if math.isfinite(self.best) else 0.0
        if figure < self.best - margin:
            self.best, self.bad = figure, 0
        else:
            self.bad += 1
        if self.resting > 0:
            self.resting -= 1
            self.bad = 0
        if self.bad > self._patience:
            self.value = max(self.value * self._reduction, self._least)
            self.resting, self.bad = self._cooldown, 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "best": self.best, "bad": self.bad, "resting": self.resting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.best, self.bad, self.resting = (state[k] for k in ("value", "best", "bad", "resting"))


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """The keys that every schedule has (conf/schedule/_warmup.yaml): a linear warmup before it."""

    warmup_epochs: NonNegative | None
    warmup_steps: Natural | None
    warmup_share: Probability
    warmup_start: Probability

    def length(self, steps: int, steps_per_epoch: float) -> int:
        """Steps of warmup. Raises UserError when it is longer than the training."""
        horizon = Horizon(0, steps, steps_per_epoch)
        length = int(_length("warmup", self.warmup_epochs, self.warmup_steps, horizon, self.warmup_share * steps))
        if length > steps:
            given = f"epochs={self.warmup_epochs:g}" if self.warmup_steps is None else f"steps={self.warmup_steps}"
            raise UserError(
                f"schedule.warmup_{given}: a warmup of {length} steps is longer than the training ({steps} steps); "
                f"shorten it or raise epochs"
            )
        return length


class WarmedUp:
    """`component` under a linear ramp over the first `length` updates.

    The ramp is start + (1 - start) (t + 1) / (length + 1): it stands at `start` before the first update, so no update
    is lost to a learning rate of zero, and it reaches 1 at t = length, where the component takes over.
    """

    def __init__(self, component: Factor, length: int, start: float) -> None:
        self.component, self.length, self.start = component, length, start
        self._slope = (1.0 - start) / (length + 1)

    def __call__(self, t: int) -> float:
        if t >= self.length:
            return self.component(t)
        return (self.start + self._slope * (t + 1)) * self.component(t)


def build(factory: Callable[..., Factor], warmup: Warmup, *, steps: int, steps_per_epoch: float) -> Factor:
    """The schedule of a run of `steps` updates: `factory` is a choice with all its keys bound but `horizon`."""
    length = warmup.length(steps, steps_per_epoch)
    component = factory(horizon=Horizon(length, steps, steps_per_epoch))
    return WarmedUp(component, length, warmup.warmup_start) if length else component


class Scheduler(torch.optim.lr_scheduler.LRScheduler):
    """Sets every group's learning rate to its base times `factor(t)`; update t uses factor(t), t from 0.

    A standard LRScheduler: `step()` after every update. It is stepped so often that it leaves out what torch's does
    besides (order checks, a copy of all values). A learning rate held in a tensor is changed in place, as captured
    graphs need it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Factor) -> None:
        self.factor = factor
        self._component: Any = getattr(factor, "component", factor)
        wanted = getattr(self._component, "momentum_wanted", False)
        groups = optimizer.param_groups
        if wanted is True and not all("momentum" in g or "betas" in g for g in groups):
            raise UserError(
                f"schedule.cycle_momentum=true: {type(optimizer).__name__} has neither momentum nor betas; "
                f"allowed is auto or false"
            )
        self._cycles_momentum = wanted is not False
        self._floats: list[float] = []
        self.ended_cycle: Callable[[int], int | None] | None = getattr(self._component, "ended_cycle", None)
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._apply()

    def _apply(self) -> None:
        floats = self._floats
        if not floats:
            floats = self._floats = [float(lr) for lr in self.base_lrs]
        factor = self.factor(self.last_epoch)
        for group, base in zip(self.optimizer.param_groups, floats, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor
        if self._cycles_momentum:
            momentum = self._component.momentum(self.last_epoch)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                elif "momentum" in group:
                    group["momentum"] = momentum

    def update(self, metrics: Mapping[str, float]) -> None:
        """Hands the figures of an evaluation to a schedule that depends on them; the next update uses the new rate."""
        if hasattr(self._component, "update"):
            self._component.update(metrics)
            self._apply()

    def scale(self, ratio: float) -> None:
        """Multiplies the learning rates by `ratio` from here on."""
        self.base_lrs = [base * ratio for base in self.base_lrs]
        self._floats = []
        self._apply()

    def get_lr(self) -> list[float | torch.Tensor]:
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def get_last_lr(self) -> list[float | torch.Tensor]:
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        return [lr.clone() if isinstance(lr, torch.Tensor) else lr for lr in lrs]

    def state_dict(self) -> dict[str, Any]:
        component = self._component.state_dict() if hasattr(self._component, "state_dict") else None
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs), "component": component}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self.base_lrs = state_dict["last_epoch"], list(state_dict["base_lrs"])
        self._floats = []
        if state_dict["component"] is not None:
            self._component.load_state_dict(state_dict["component"])
        self._apply()
