"""Warm restarts and the one-cycle policy."""

from bisect import bisect_right
from collections.abc import Callable
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from dlopt.errors import UserError
from dlopt.ranges import Count, Fraction, Natural, NonNegative, Positive, PositiveFraction, Probability
from dlopt.schedules.horizon import Factor, Horizon, half_cosine, length_of, one_unit, progress

AtLeastOne = Annotated[float, Ge(1)]
Open = Annotated[float, Interval(gt=0, lt=1)]


class Cycles:
    """Cycles of growing length between the warmup and the end of the run.

    The end of the run belongs to the cycle that arrives there: no restart falls on the step after the last.
    """

    def __init__(self, horizon: Horizon, epochs: float | None, steps: int | None, growth: float, cycles: int) -> None:
        rest = horizon.steps - horizon.start
        length = length_of("T_0", epochs, steps, horizon, rest / sum(growth**i for i in range(cycles)))
        self.steps = horizon.steps
        self.begins, self.lengths = [float(horizon.start)], [length]
        while self.begins[-1] + self.lengths[-1] < horizon.steps * (1 - 1e-12):
            self.begins.append(self.begins[-1] + self.lengths[-1])
            self.lengths.append(self.lengths[-1] * growth)

    def locate(self, t: float) -> tuple[int, float, float]:
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

    def __call__(self, t: float) -> float:
        return self._factor(*self._locate(t))


def cosine_restarts(
    *,
    T_0_epochs: Positive | None,
    T_0_steps: Count | None,
    cycles: Annotated[int, Interval(ge=1, le=50)],
    T_mult: Annotated[float, Interval(ge=1, le=10)],
    eta_min: Probability,
    peak_factor: PositiveFraction,
    eta_min_factor: PositiveFraction,
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
        cycle_warmup_fraction=0.0,
        horizon=horizon,
    )


def cosine_warmup_restarts(
    *,
    T_0_epochs: Positive | None,
    T_0_steps: Count | None,
    cycles: Annotated[int, Interval(ge=1, le=50)],
    T_mult: Annotated[float, Interval(ge=1, le=10)],
    eta_min: Probability,
    peak_factor: PositiveFraction,
    eta_min_factor: PositiveFraction,
    cycle_warmup_epochs: NonNegative | None,
    cycle_warmup_steps: Natural | None,
    cycle_warmup_fraction: Fraction,
    horizon: Horizon,
) -> Factor:
    """`cosine_restarts` in which every cycle begins with a linear warmup from its minimum to its peak, not a jump.

    The warmup is a share of each cycle, or of one length for all.
    """
    periods = Cycles(horizon, T_0_epochs, T_0_steps, T_mult, cycles)
    one_unit("cycle_warmup", cycle_warmup_epochs, cycle_warmup_steps)
    fixed = cycle_warmup_epochs is not None or cycle_warmup_steps is not None
    length = length_of("cycle_warmup", cycle_warmup_epochs, cycle_warmup_steps, horizon, 0.0)
    shortest = periods.lengths[0]
    if fixed and length >= shortest > 0:
        raise UserError(
            f"schedule=cosine_warmup_restarts: a warmup of {length:g} steps leaves nothing of the first cycle "
            f"({shortest:g} steps); shorten schedule.cycle_warmup_* or lengthen schedule.T_0_*"
        )

    def factor(i: int, since: float, period: float) -> float:
        high = peak_factor**i
        low = min(eta_min * eta_min_factor**i, high)
        warm = length if fixed else cycle_warmup_fraction * period
        if since < warm:
            return low + (high - low) * (since + 1) / (warm + 1)  # as in WarmedUp, no update at zero
        return low + (high - low) * half_cosine(progress(since, warm, period - warm))

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
        base_momentum: Fraction,
        max_momentum: Fraction,
        horizon: Horizon,
    ) -> None:
        if base_momentum > max_momentum:
            raise UserError(
                f"schedule.base_momentum={base_momentum}: is above schedule.max_momentum={max_momentum}; "
                f"the base is the lower end"
            )
        self.start = horizon.start
        self.momentum_wanted = cycle_momentum
        self._anneal = half_cosine if anneal == "cosine" else lambda x: 1.0 - x
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

    def _value(self, t: float, which: int) -> float:
        now, begin = max(t - self.start, 0), 0.0
        for i, phase in enumerate(self._phases):
            if now <= phase[0] or i == len(self._phases) - 1:
                break
            begin = max(phase[0], 0.0)
        a, b = phase[which], phase[which + 1]
        return b + (a - b) * self._anneal(progress(now, begin, phase[0] - begin))

    def __call__(self, t: float) -> float:
        return self._value(t, 1)

    def momentum(self, t: float) -> float:
        return self._value(t, 3)
