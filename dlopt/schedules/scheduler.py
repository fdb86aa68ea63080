"""`Scheduler` applies a schedule's factors to an optimizer; `Plateau` is the schedule that follows a metric."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from dlopt.basics.errors import UserError
from dlopt.basics.names import Names
from dlopt.basics.ranges import Natural, NonNegative, OpenFraction, Probability
from dlopt.metrics.names import Direction, known_direction, lower_is_better
from dlopt.optim.traits import is_schedule_free
from dlopt.schedules.decay import WeightDecay
from dlopt.schedules.horizon import Factor, Horizon, Schedule


class Scheduler(torch.optim.lr_scheduler.LRScheduler):
    """Sets the learning rate of each group to its base times `schedule.factor(t)`; update t uses factor(t), t from 0.

    A group with `horizon` h, a fraction of the run, uses factor(t / h): its schedule ends after that fraction, and the
    factor stays at its final value; a momentum that the schedule cycles as well. While its learning rate is zero, or
    always if its base is zero, a group rests: an update changes none of its parameters, even with an optimizer whose
    steps do not follow the learning rate (Rprop), continue by momentum (LARS), or follow an average (schedule-free).
    With `freezes`, the parameters of a group with a horizon then have requires_grad=False, which saves time and changes
    no result.

    With `decay`, also sets the weight decay of each group to its base times the factor of `decay`. With `scale`,
    multiplies all learning rates by scale(t): of a batch that grows, whose updates advance t by several steps.

    A standard LRScheduler: call `step()` after every update. For speed it omits torch's order checks and its copy of
    all values. Values that are tensors are changed in place, as CUDA graphs require.

    Attributes:
        rate: learning rate of the next update, as a float: of the first group without multipliers, if any.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | Factor,
        *,
        freezes: bool = False,
        decay: WeightDecay | None = None,
        scale: Factor | None = None,
    ) -> None:
        self.schedule = Schedule.of(schedule)
        self.ended_cycle, self.restarts = self.schedule.ended_cycle, self.schedule.restarts
        self._factor, self._scale = self.schedule.factor, scale
        groups = optimizer.param_groups
        # Schedule-free optimizers use this key to interpolate between points: changed, it would move their average.
        averages, is_required = is_schedule_free(type(optimizer)), self.schedule.requires_momentum
        self._cycled: list[int] = []  # groups whose momentum it sets
        if self.schedule.momentum is not None:
            if is_required and (averages or not all("momentum" in g or "betas" in g for g in groups)):
                raise UserError(
                    f"schedule.cycle_momentum=true: {type(optimizer).__name__} has neither momentum nor betas to "
                    "cycle; set auto or false (the attribute cycle_momentum of a schedule of your own that has "
                    "momentum(t))"
                )
            # auto leaves a momentum of 0 off: gradient descent must not become another method.
            self._cycled = [] if averages else [i for i, g in enumerate(groups) if is_required or _momentum(g) != 0]
        self.decay = decay
        # (index, weight decay, peak rate) of each group whose decay it sets. Kept here: a restored optimizer has the
        # decay of its last update, not the base.
        self._decayed = [
            (i, group["weight_decay"], float(group["lr"]))
            for i, group in enumerate(groups)
            if decay is not None and group.get("normalized", not decay.normalized_only)
        ]
        self._horizons = [group.get("horizon", 1.0) for group in groups]
        if self.schedule.follows is not None and any(horizon != 1.0 for horizon in self._horizons):
            raise UserError(
                "optimizer.groups: horizon is a fraction of the schedule, but schedule=plateau has no length"
            )
        # Rules may give the first group another rate than optimizer.lr, such as the smallest one with layer_decay.
        lr = getattr(optimizer, "base", optimizer).defaults.get("lr")  # SAM has the groups of its base
        plain = (g["lr"] == lr and horizon == 1.0 for g, horizon in zip(groups, self._horizons, strict=True))
        self._shown = next((index for index, is_plain in enumerate(plain) if is_plain), 0)
        self._freezes = freezes
        self._rests = [False] * len(groups)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # parameter that rests and its values, in an update
        self.rate = 0.0
        self._base_floats: list[float] = []  # base_lrs as floats; empty if they must be read again
        if any(group["lr"] == 0 or group.get("horizon", 1.0) != 1.0 for group in groups):
            optimizer.register_step_pre_hook(self._keep)
            optimizer.register_step_post_hook(self._restore)
        super().__init__(optimizer)
        vars(optimizer).pop("step", None)  # torch's wrapper, which serves the order check in every update

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._apply()

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        factors = self._factors()
        lrs = self._lrs(factors)
        self._rest(factors)
        self.rate = lrs[self._shown]
        for group, lr in zip(groups, lrs, strict=True):
            _set(group, "lr", lr)
        if self.decay is not None:
            for i, base, peak in self._decayed:
                factor = self.decay.factor(self.last_epoch / self._horizons[i], factors[i], peak)
                _set(groups[i], "weight_decay", float(base * factor))
        for i in self._cycled:
            momentum = self._momentum(i, self.last_epoch)
            if "betas" in groups[i]:
                groups[i]["betas"] = (momentum, *groups[i]["betas"][1:])
            else:
                groups[i]["momentum"] = momentum

    def _factors(self) -> list[float]:
        """Returns the factor of each group, computed once per horizon."""
        factors = {horizon: self._factor(self.last_epoch / horizon) for horizon in set(self._horizons)}
        return [factors[horizon] for horizon in self._horizons]

    def _lrs(self, factors: list[float]) -> list[float]:
        if not self._base_floats:
            self._base_floats = [float(lr) for lr in self.base_lrs]
        # A factor of a user's own may be a number of NumPy, which cannot be read from a checkpoint.
        lrs = [float(base * factor) for base, factor in zip(self._base_floats, factors, strict=True)]
        return lrs if self._scale is None else [lr * self._scale(self.last_epoch) for lr in lrs]

    def _momentum(self, group: int, update: int) -> float:
        assert self.schedule.momentum is not None
        return float(self.schedule.momentum(update / self._horizons[group]))

    @property
    def cycles_momentum(self) -> bool:
        return bool(self._cycled)

    @property
    def decayed_groups(self) -> list[int]:
        """The parameter groups whose weight decay the schedule changes between updates."""
        return [i for i, _, _ in self._decayed] if self.decay is not None and self.decay.varies else []

    @property
    def resting(self) -> int:
        """The number of groups that rest."""
        return sum(self._rests)

    def weight_decay(self, update: int) -> float | None:
        """Returns the weight decay in an update (from 0); None if no schedule sets it.

        Belongs to the group of `rate`, or to the first group that decays. Exact since the latest `update` with metrics.
        """
        decayed = [each for each in self._decayed if each[1]]
        if self.decay is None or not decayed:
            return None
        i, base, peak = next((each for each in decayed if each[0] == self._shown), decayed[0])
        t = update / self._horizons[i]
        return base * self.decay.factor(t, self._factor(t), peak)

    def momentum(self, update: int) -> float | None:
        """Returns the momentum, or betas[0], in an update (from 0); None if the schedule sets none.

        Belongs to the group of `rate`, or to the first group whose momentum the schedule sets.
        """
        if not self._cycled:
            return None
        return self._momentum(self._shown if self._shown in self._cycled else self._cycled[0], update)

    def _rest(self, factors: list[float]) -> None:
        """Finds the resting groups, and freezes or unfreezes the parameters of groups with a horizon."""
        is_over = [horizon != 1.0 and factor == 0.0 for horizon, factor in zip(self._horizons, factors, strict=True)]
        rests = [over or base == 0.0 for over, base in zip(is_over, self._base_floats, strict=True)]
        if rests == self._rests:
            return
        for group, over, horizon in zip(self.optimizer.param_groups, is_over, self._horizons, strict=True):
            if self._freezes and horizon != 1.0:
                for parameter in group["params"]:
                    parameter.requires_grad_(not over)
                    parameter.grad = None
        self._rests = rests

    @torch.no_grad()
    def _keep(self, *_: object) -> None:
        """Copies the values of parameters that rest, before an update. Frozen ones have no gradient."""
        groups = zip(self.optimizer.param_groups, self._rests, strict=True)
        resting = [p for group, rests in groups if rests for p in group["params"] if p.requires_grad]
        self._kept = [(p, p.clone()) for p in resting]

    @torch.no_grad()
    def _restore(self, *_: object) -> None:
        for parameter, values in self._kept:
            parameter.copy_(values)
        self._kept.clear()

    def update(self, metrics: Mapping[str, float]) -> None:
        """Passes the metrics of an evaluation to a schedule that follows them; takes effect at the next update."""
        if self.schedule.follows is not None:
            self.schedule.follows.update(metrics)
            self._apply()

    def get_lr(self) -> list[float | torch.Tensor]:
        return [*self._lrs(self._factors())]

    def get_last_lr(self) -> list[float | torch.Tensor]:
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        return [lr.clone() if isinstance(lr, torch.Tensor) else lr for lr in lrs]

    def state_dict(self) -> dict[str, Any]:
        follows = self.schedule.follows
        component = None if follows is None else follows.state_dict()
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs), "component": component}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self.base_lrs = state_dict["last_epoch"], list(state_dict["base_lrs"])
        self._base_floats = []
        if self.schedule.follows is not None and state_dict["component"] is not None:
            self.schedule.follows.load_state_dict(state_dict["component"])
        self._apply()


def _set(group: dict[str, Any], key: str, value: float) -> None:
    if type(group[key]) is float or not isinstance(group[key], torch.Tensor):  # the first test is faster
        group[key] = value
    else:
        group[key].fill_(value)


def _momentum(group: Mapping[str, Any]) -> float:
    """Returns the momentum of a parameter group, or its betas[0]; 0 without one."""
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


class Plateau:
    """Multiplies the learning rate by `factor` when a metric has not improved for more than `patience` evaluations.

    Equals torch's ReduceLROnPlateau, except for negative values with a relative threshold: there torch also counts a
    value that is worse by up to the threshold as an improvement. NaN counts as no improvement.
    """

    def __init__(
        self,
        *,
        monitor: str,
        mode: Literal["auto", Direction],
        factor: OpenFraction,
        patience: Natural,
        threshold: NonNegative,
        threshold_mode: Literal["rel", "abs"],
        cooldown: Natural,
        min_factor: Probability,
        horizon: Horizon,
        monitor_mode: Direction | None = None,
    ) -> None:
        self.monitor = monitor
        # The first evaluation refuses an unknown metric and lists the known ones.
        self._direction = (known_direction(monitor) or monitor_mode) if mode == "auto" else mode
        self._reduction, self._patience, self._cooldown, self._min_factor = factor, patience, cooldown, min_factor
        self._threshold, self._relative = threshold, threshold_mode == "rel"
        self.value, self.best, self.num_bad, self.cooldown_left = 1.0, math.inf, 0, 0

    def __call__(self, t: float) -> float:
        return self.value

    def update(self, metrics: Mapping[str, float]) -> None:
        """Receives the metrics of an evaluation. Raises `UserError` if the monitored one is missing."""
        Names("evaluated metric", sorted(metrics), prefix="schedule.monitor=").check(self.monitor)
        is_lower = lower_is_better(self.monitor) if self._direction is None else self._direction == "min"
        metric = metrics[self.monitor] if is_lower else -metrics[self.monitor]
        margin = self._threshold * (abs(self.best) if self._relative else 1.0) if math.isfinite(self.best) else 0.0
        if metric < self.best - margin:
            self.best, self.num_bad = metric, 0
        else:
            self.num_bad += 1
        if self.cooldown_left > 0:
            self.cooldown_left -= 1
            self.num_bad = 0
        if self.num_bad > self._patience:
            self.value = max(self.value * self._reduction, self._min_factor)
            self.cooldown_left, self.num_bad = self._cooldown, 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "best": self.best, "bad": self.num_bad, "resting": self.cooldown_left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.best = state["value"], state["best"]
        self.num_bad, self.cooldown_left = state["bad"], state["resting"]
