"""Factors as a standard `LRScheduler` of an optimizer, and the one that depends on a validation metric."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval

from dlopt.errors import UserError
from dlopt.ranges import Natural, NonNegative, Probability
from dlopt.schedules.horizon import Factor, Horizon


class Scheduler(torch.optim.lr_scheduler.LRScheduler):
    """Sets every group's learning rate to its base times `factor(t)`; update t uses factor(t), t from 0.

    For a group with a `horizon` h, a share of the run, it is factor(t / h): the schedule runs faster for it, and where
    that ends the group stays. With `freezes` its parameters ask for no gradients while their learning rate is zero,
    which changes nothing but the time; `frozen` counts the groups of which this holds.

    A standard LRScheduler: `step()` after every update. It is stepped so often that it leaves out what torch's does
    besides (order checks, a copy of all values). A learning rate held in a tensor is changed in place, as captured
    graphs need it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Factor, *, freezes: bool = False) -> None:
        self.factor = factor
        self._component: Any = getattr(factor, "component", factor)
        wanted = getattr(self._component, "momentum_wanted", False)
        groups = optimizer.param_groups
        if wanted is True and not all("momentum" in g or "betas" in g for g in groups):
            raise UserError(
                f"schedule.cycle_momentum=true: {type(optimizer).__name__} has neither momentum nor betas; "
                f"allowed is auto or false"
            )
        self.cycles_momentum = wanted is not False
        self._shares = [group.get("horizon", 1.0) for group in groups]
        self._is_uneven = any(share != 1.0 for share in self._shares)
        if self._is_uneven and hasattr(self._component, "update"):
            raise UserError("optimizer.groups: a horizon is a share of the schedule, and this one has no length")
        self._freezes = freezes
        self.frozen = 0
        self.rate = 0.0  # of the first group, for the next update: a number, whatever holds it
        self._floats: list[float] = []
        self.ended_cycle: Callable[[int], int | None] | None = getattr(self._component, "ended_cycle", None)
        super().__init__(optimizer)
        vars(optimizer).pop("step", None)  # torch's wrapper, which serves its order check in every update

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._apply()

    def _apply(self) -> None:
        floats = self._floats
        if not floats:
            floats = self._floats = [float(lr) for lr in self.base_lrs]
        if self._is_uneven:
            floats = self._uneven(floats)
            factor = 1.0
        else:
            factor = self.factor(self.last_epoch)
        self.rate = floats[0] * factor
        for group, base in zip(self.optimizer.param_groups, floats, strict=True):
            if type(group["lr"]) is float or not isinstance(group["lr"], torch.Tensor):
                group["lr"] = base * factor
            else:
                group["lr"].fill_(base * factor)
        if self.cycles_momentum:
            momentum = self._component.momentum(self.last_epoch)
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                elif "momentum" in group:
                    group["momentum"] = momentum

    def _uneven(self, bases: list[float]) -> list[float]:
        """The learning rates where not all groups follow the schedule at its own pace."""
        factors = [self.factor(self.last_epoch / share) for share in self._shares]
        if self._freezes:
            resting = [share != 1.0 and factor == 0.0 for share, factor in zip(self._shares, factors, strict=True)]
            if sum(resting) != self.frozen:
                self.frozen = sum(resting)
                for group, rests in zip(self.optimizer.param_groups, resting, strict=True):
                    for parameter in group["params"]:
                        parameter.requires_grad_(not rests)
                        parameter.grad = None
        return [base * factor for base, factor in zip(bases, factors, strict=True)]

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
        factors = [self.factor(self.last_epoch / share) for share in self._shares]
        return [base * factor for base, factor in zip(self.base_lrs, factors, strict=True)]

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
