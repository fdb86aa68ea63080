"""A learning rate that falls when a validation figure stays."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Interval

from dlopt.errors import UserError
from dlopt.ranges import Natural, NonNegative, Probability
from dlopt.schedules.horizon import Horizon

Open = Annotated[float, Interval(gt=0, lt=1)]


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

    def __call__(self, t: float) -> float:
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
