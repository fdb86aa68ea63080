"""Schedules without restarts: constant, step, exponential, cosine, ... Pure functions of the update t."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import INCREASING, Count, NonNegative, Positive, PositiveFraction, Probability
from dlopt.schedules.horizon import Factor, Horizon, half_cosine, length_of, one_unit, progress, whole


def constant(*, horizon: Horizon) -> Factor:
    return lambda t: 1.0


def step(
    *,
    gamma: PositiveFraction,
    every_epochs: Positive | None,
    every_steps: Count | None,
    every_fraction: PositiveFraction,
    horizon: Horizon,
) -> Factor:
    """gamma^floor(t / every), t counted from the start of training; torch's StepLR.

    Update t = every is the first with the reduced learning rate.
    """
    every = length_of("every", every_epochs, every_steps, horizon, every_fraction * horizon.steps)
    # floor(whole(...)), not //: 11 // 2.2 is 4
    return lambda t: gamma ** math.floor(whole(min(t, horizon.steps) / every))


def multistep(
    *,
    gamma: PositiveFraction,
    milestones_epochs: Annotated[tuple[Positive, ...], INCREASING] | None,
    milestones_steps: Annotated[tuple[Count, ...], INCREASING] | None,
    milestones_fraction: Annotated[tuple[PositiveFraction, ...], INCREASING],
    horizon: Horizon,
) -> Factor:
    """gamma^(number of milestones <= t), t counted from the start of training; torch's MultiStepLR."""
    one_unit("milestones", milestones_epochs, milestones_steps)
    milestones: Sequence[float] | None = milestones_steps
    if milestones is None and milestones_epochs is not None:
        milestones = [whole(m * horizon.steps_per_epoch) for m in milestones_epochs]
    if milestones is None:
        milestones = [whole(m * horizon.steps) for m in milestones_fraction]
    return lambda t: gamma ** bisect_right(milestones, min(t, horizon.steps))


def exponential(*, k: NonNegative, unit: Literal["epochs", "steps"], horizon: Horizon) -> Factor:
    """exp(-k t), t in epochs (fractions included) or in steps since the warmup."""
    rate = k / horizon.steps_per_epoch if unit == "epochs" else k
    return lambda t: math.exp(-rate * max(min(t, horizon.steps) - horizon.start, 0))


def time_decay(*, decay: NonNegative, unit: Literal["epochs", "steps"], horizon: Horizon) -> Factor:
    """1 / (1 + decay t), t in epochs (fractions included) or in steps since the warmup.

    The factor applies to the peak; it does not compound from step to step (as in Keras' old `decay`).
    """
    rate = decay / horizon.steps_per_epoch if unit == "epochs" else decay
    return lambda t: 1.0 / (1.0 + rate * max(min(t, horizon.steps) - horizon.start, 0))


def cosine(*, final: Probability, decay_epochs: Positive | None, decay_steps: Count | None, horizon: Horizon) -> Factor:
    """Half a cosine from 1 to `final`, over the given length or the rest of the run; torch's CosineAnnealingLR."""
    length = length_of("decay", decay_epochs, decay_steps, horizon, horizon.steps - horizon.start)
    return lambda t: final + (1.0 - final) * half_cosine(progress(min(t, horizon.steps), horizon.start, length))


def polynomial(
    *, power: Positive, final: Probability, decay_epochs: Positive | None, decay_steps: Count | None, horizon: Horizon
) -> Factor:
    """final + (1 - final) (1 - x)^power, x = 0..1 over the given length or the rest of the run; PolynomialLR."""
    length = length_of("decay", decay_epochs, decay_steps, horizon, horizon.steps - horizon.start)
    return lambda t: final + (1.0 - final) * (1.0 - progress(min(t, horizon.steps), horizon.start, length)) ** power


def linear(*, final: Probability, decay_epochs: Positive | None, decay_steps: Count | None, horizon: Horizon) -> Factor:
    """Linear from 1 to `final`, over the given length or the rest of the run."""
    return polynomial(power=1.0, final=final, decay_epochs=decay_epochs, decay_steps=decay_steps, horizon=horizon)


def wsd(
    *,
    decay_epochs: Positive | None,
    decay_steps: Count | None,
    decay_fraction: Probability,
    final: Probability,
    shape: Literal["linear", "cosine", "sqrt"] | Positive,
    stable: Literal["constant", "inverse_sqrt"],
    timescale_steps: Count | None,
    horizon: Horizon,
) -> Factor:
    """Warmup (the common keys), stable, decay: 1 until the decay, which ends with the run (Hu et al. 2024, MiniCPM).

    `sqrt` is 1 - sqrt(x), the best shape in Hagele et al. 2024; a number p is (1 - x)^p: for easy tasks the optimum has
    this form, by arXiv 2602.06797, with a p that depends on the task. With stable=inverse_sqrt the factor until the
    decay is sqrt(a / (a + t)), t since the warmup and a = `timescale_steps` (Zhai et al. 2022, "Scaling vision
    transformers"; Meterez et al. 2026, arXiv 2602.03702). Without a decay, the schedule does not depend on the length
    of the run, and continues after it.
    """
    rest = horizon.steps - horizon.start
    length = length_of("decay", decay_epochs, decay_steps, horizon, decay_fraction * rest)
    if length > rest:
        raise UserError(
            f"schedule=wsd: the decay of {length:g} steps is longer than the {rest} steps after the warmup; reduce "
            f"schedule.decay_epochs or schedule.decay_steps"
        )
    curves: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1.0 - x,
        "cosine": half_cosine,
        "sqrt": lambda x: 1.0 - math.sqrt(x),
    }
    curve = curves[shape] if isinstance(shape, str) else lambda x: (1.0 - x) ** shape
    decay_start = horizon.steps - length
    if stable == "constant" and timescale_steps is not None:
        raise UserError(f"schedule.timescale_steps={timescale_steps}: only with schedule.stable=inverse_sqrt")
    timescale = max(horizon.start, 1) if timescale_steps is None else timescale_steps

    def without_decay(t: float) -> float:
        if stable == "constant":
            return 1.0
        return math.sqrt(timescale / (timescale + max(t - horizon.start, 0.0)))

    def factor(t: float) -> float:
        high = without_decay(min(t, horizon.steps))
        low = min(final, high)
        return low + (high - low) * curve(progress(t, decay_start, length))

    return factor if length else without_decay
