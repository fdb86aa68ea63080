"""Warm restarts and the one-cycle policy."""

from bisect import bisect_right
from collections.abc import Callable
from typing import Annotated, Literal, TypedDict, Unpack

from annotated_types import Ge, Interval

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    OpenFraction,
    Positive,
    PositiveFraction,
    Probability,
)
from dlopt.schedules.horizon import Factor, Horizon, half_cosine, length_of, progress, whole

AtLeastOne = Annotated[float, Ge(1)]


class RestartKeys(TypedDict):
    """The keys that both schedules with warm restarts have, and the horizon, which is known only at run time."""

    T_0_epochs: Positive | None
    T_0_steps: Count | None
    cycles: Annotated[int, Interval(ge=1, le=50)]
    T_mult: Annotated[float, Interval(ge=1, le=10)]
    eta_min: Probability
    peak_factor: PositiveFraction
    eta_min_factor: PositiveFraction
    horizon: Horizon


class Restarts:
    """A schedule of cycles of growing length between the warmup and the end of the run.

    A cycle of length n that starts at t = s has its peak at s and would reach its minimum at s + n, where the next one
    starts. So the last update of a cycle is one step above the minimum. `factor` is a function of (cycle index, steps
    since its start, its length).
    """

    def __init__(self, keys: RestartKeys, factor: Callable[[int, float, float], float]) -> None:
        horizon, epochs, growth = keys["horizon"], keys["T_0_epochs"], keys["T_mult"]
        rest = horizon.steps - horizon.start
        default = rest / sum(growth**i for i in range(keys["cycles"]))
        length = length_of("T_0", epochs, keys["T_0_steps"], horizon, default)
        if epochs is not None and length < 1:
            raise UserError(
                f"schedule.T_0_epochs={epochs:g}: a cycle of {length:.2g} updates; must be at least one update"
            )
        self._steps, self._factor = horizon.steps, factor
        self._starts, self.lengths = [float(horizon.start)], [length]
        # The tolerance keeps rounding from adding a cycle at t = steps: there the last cycle is at its minimum.
        while self._starts[-1] + self.lengths[-1] < horizon.steps * (1 - 1e-12):
            self._starts.append(whole(self._starts[-1] + self.lengths[-1]))
            self.lengths.append(self.lengths[-1] * growth)
        self.restarts = self._starts[1:]  # steps at which another cycle starts

    def __call__(self, t: float) -> float:
        return self._factor(*self._locate(t))

    def _locate(self, t: float) -> tuple[int, float, float]:
        """Returns (index of the cycle at t, steps since its start, its length in steps)."""
        now = min(t, self._steps)
        i = max(bisect_right(self._starts, now) - 1, 0)
        return i, max(now - self._starts[i], 0.0), self.lengths[i]

    def ended_cycle(self, t: int) -> int | None:
        """Returns the number, from 1, of the cycle whose last update is t; None if t is not the last of a cycle."""
        i, elapsed, length = self._locate(t)
        return i + 1 if t < self._steps and elapsed + 1 >= length * (1 - 1e-12) else None


def cosine_restarts(**keys: Unpack[RestartKeys]) -> Factor:
    """SGDR (Loshchilov & Hutter 2017), annealed every step; torch's CosineAnnealingWarmRestarts.

    In cycle i (from 0), of T_0 T_mult^i steps, the factor falls from peak_factor^i to eta_min eta_min_factor^i. Without
    T_0 the run is divided into `cycles` cycles and ends with the last of them.
    """
    return cosine_warmup_restarts(cycle_warmup_epochs=None, cycle_warmup_steps=None, cycle_warmup_fraction=0.0, **keys)


def cosine_warmup_restarts(
    *,
    cycle_warmup_epochs: NonNegative | None,
    cycle_warmup_steps: Natural | None,
    cycle_warmup_fraction: Fraction,
    **keys: Unpack[RestartKeys],
) -> Factor:
    """`cosine_restarts` whose cycles start with a linear warmup from the minimum to the peak, instead of a jump.

    The warmup is a fraction of each cycle, or has the same length in all cycles.
    """
    has_fixed_warmup = cycle_warmup_epochs is not None or cycle_warmup_steps is not None
    fixed_warmup = length_of("cycle_warmup", cycle_warmup_epochs, cycle_warmup_steps, keys["horizon"], 0.0)

    def factor(i: int, elapsed: float, length: float) -> float:
        high = keys["peak_factor"] ** i
        low = min(keys["eta_min"] * keys["eta_min_factor"] ** i, high)
        warmup = fixed_warmup if has_fixed_warmup else cycle_warmup_fraction * length
        if elapsed < warmup:
            # As in WarmedUp: the first update is one step above the minimum, which may be zero.
            return low + (high - low) * (elapsed + 1) / (warmup + 1)
        return low + (high - low) * half_cosine(progress(elapsed, warmup, length - warmup))

    schedule = Restarts(keys, factor)
    shortest = schedule.lengths[0]
    if has_fixed_warmup and fixed_warmup >= shortest > 0:
        raise UserError(
            f"schedule=cosine_warmup_restarts: the cycle warmup of {fixed_warmup:g} steps is not shorter than the "
            f"first cycle ({shortest:g} steps); reduce schedule.cycle_warmup_* or increase schedule.T_0_*"
        )
    return schedule


class OneCycle:
    """1cycle (Smith & Topin 2018): from peak / div_factor up to the peak, down to peak / (div_factor final_div_factor).

    Equals torch's OneCycleLR at every step: the last update has the final learning rate. `momentum(t)` runs the
    opposite way; `Scheduler` sets it as `momentum` or `betas[0]`.
    """

    def __init__(
        self,
        *,
        pct_start: OpenFraction,
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
                f"schedule.base_momentum={base_momentum}: must not be greater than schedule.max_momentum={max_momentum}"
            )
        if three_phase and pct_start > 0.5:
            raise UserError(
                f"schedule.pct_start={pct_start}: with schedule.three_phase=true the way up and the way down take this "
                f"fraction of the run each, which leaves no time for the last phase; must be at most 0.5"
            )
        self.start = horizon.start
        self.cycle_momentum = cycle_momentum
        self._anneal = half_cosine if anneal == "cosine" else lambda x: 1.0 - x
        steps = horizon.steps - horizon.start
        low, last = 1.0 / div_factor, 1.0 / (div_factor * final_div_factor)
        up = pct_start * steps - 1
        # Per phase: (its last step, factor at its start, factor at its end, momentum at its start, at its end)
        self._phases = [(up, low, 1.0, max_momentum, base_momentum)]
        if three_phase:
            self._phases.append((2 * pct_start * steps - 2, 1.0, low, base_momentum, max_momentum))
            self._phases.append((steps - 1, low, last, max_momentum, max_momentum))
        else:
            self._phases.append((steps - 1, 1.0, last, base_momentum, max_momentum))

    def _interpolate(self, t: float, column: int) -> float:
        """Anneals between `column` and the one after it in the phase of update t."""
        now, start = max(t - self.start, 0), 0.0
        for i, phase in enumerate(self._phases):
            if now <= phase[0] or i == len(self._phases) - 1:
                break
            start = phase[0]  # below 0 if the phase is shorter than one step
        a, b = phase[column], phase[column + 1]
        return b + (a - b) * self._anneal(progress(now, start, phase[0] - start))

    def __call__(self, t: float) -> float:
        return self._interpolate(t, 1)

    def momentum(self, t: float) -> float:
        return self._interpolate(t, 3)
