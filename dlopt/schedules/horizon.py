"""What a schedule knows of its run, and the pieces that curves are made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dlopt.errors import UserError

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
