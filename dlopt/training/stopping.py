"""Stopping rules, and the best epoch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Natural, NonNegative, Positive
from dlopt.metrics.names import (
    VAL_ACCURACY,
    VAL_LOSS,
    Direction,
    base_name,
    finite,
    lower_is_better,
    resolve_monitor,
    selection_key,
    split_of,
)
from dlopt.parallel.shards import local, plain_norm
from dlopt.training.clipping import Norm


@runtime_checkable
class Stopping(Protocol):
    """What a run asks of a stopping rule. Equal metrics must lead to equal decisions: all ranks stop together."""

    @property
    def should_stop(self) -> bool:
        """Read after each update and each evaluation."""
        ...

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Processes the metrics of an evaluation, which are equal on all ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, for the checkpoint: numbers and texts."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class WeightStopping(Stopping, Protocol):
    """A rule that also looks at the weights after each update that has changed them."""

    def after_change(self) -> None: ...


class Rule(Stopping):
    """A rule whose state consists of the attributes `state_names`."""

    state_names: ClassVar[tuple[str, ...]] = ()

    def update(self, metrics: Mapping[str, Any]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.state_names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.state_names:
            setattr(self, name, state[name])


def monitored_key(metrics: Mapping[str, Any], monitor: str, direction: Direction | None = None) -> tuple[float, float]:
    """Returns the `selection_key` of an evaluation; its first entry is the monitored metric as a loss.

    `direction` of a user's metric. Raises `UserError` if the metric is not logged.
    """
    monitor = resolve_monitor(monitor, metrics)
    if metrics.get(monitor) is None:
        logged = ", ".join(sorted(key for key in metrics if split_of(key) == "val")) or "none"
        raise UserError(f"monitor={monitor}: unknown validation metric; this run logs: {logged}")
    return selection_key(metrics, monitor, _directions(monitor, direction))


def _directions(monitor: str, direction: Direction | None) -> dict[str, Direction]:
    return {} if direction is None else {base_name(monitor): direction}


class Never(Rule):
    """Trains for all epochs."""

    should_stop = False


class Early(Rule):
    """Stops after `patience` evaluations in a row without an improvement by more than `min_delta`.

    A non-finite metric is no improvement.
    """

    state_names = ("best", "waited")

    def __init__(
        self, monitor_mode: Direction | None = None, *, monitor: str, patience: Count, min_delta: NonNegative
    ) -> None:
        self.monitor, self.direction = monitor, monitor_mode
        self.patience = patience
        self.min_delta = min_delta
        self.best = math.inf
        self.waited = 0

    @property
    def should_stop(self) -> bool:
        return self.waited >= self.patience

    def update(self, metrics: Mapping[str, Any]) -> None:
        value, _ = monitored_key(metrics, self.monitor, self.direction)
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1


class Target(Rule):
    """Stops at the first evaluation whose metric is as good as `value` (time to accuracy, Coleman et al. 2017)."""

    should_stop = False
    state_names = ("should_stop",)

    def __init__(self, monitor_mode: Direction | None = None, *, monitor: str, value: float) -> None:
        self.monitor, self.direction = monitor, monitor_mode
        self.value = value

    def update(self, metrics: Mapping[str, Any]) -> None:
        monitor = resolve_monitor(self.monitor, metrics)
        target = self.value if lower_is_better(monitor, _directions(monitor, self.direction)) else -self.value
        self.should_stop = monitored_key(metrics, self.monitor, self.direction)[0] <= target


class Tolerance(Rule):
    """Stops when the parameters change by less than `tolerance` (2-norm) in more than `iterations` updates in a row.

    The stopping rule of plain gradient descent. `after_change` synchronizes with the device.
    """

    state_names = ("count",)

    def __init__(self, model: nn.Module, norm: Norm = plain_norm, *, tolerance: Positive, iterations: Natural) -> None:
        self.norm = norm
        self.tolerance = tolerance
        self.iterations = iterations
        self.count = 0
        self._parameters = [p.detach() for p in model.parameters() if p.requires_grad and not p.is_meta]
        self._previous = [p.clone() for p in self._parameters]

    @property
    def should_stop(self) -> bool:
        return self.count > self.iterations

    @torch.no_grad()
    def after_change(self) -> None:
        # The rule decides after every update, so the host waits for the device in each. For sharded parameters the norm
        # is a collective with the same result on all ranks, which therefore stop together.
        change = self.norm(torch._foreach_sub(self._parameters, self._previous)).item()
        self._remember()
        self.count = self.count + 1 if change < self.tolerance else 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Call after the model has been loaded: the next change is measured from its present weights."""
        super().load_state_dict(state)
        self._remember()

    def _remember(self) -> None:
        torch._foreach_copy_(list(map(local, self._previous)), list(map(local, self._parameters)))


@dataclass
class Best:
    """The best evaluation so far. Ties are broken by the smaller loss, then by the earlier epoch.

    `direction` of a metric that is not dlopt's own. `others`: all other metrics of the evaluation, by column.
    """

    monitor: str
    value: float = math.inf
    epoch: float | None = None  # a fraction within an epoch
    val_loss: float | None = None
    val_accuracy: float | None = None
    direction: Direction | None = None
    others: dict[str, float] = field(default_factory=dict)

    def update(self, metrics: Mapping[str, Any]) -> bool:
        """Returns whether these metrics are the best so far."""
        key = monitored_key(metrics, self.monitor, self.direction)
        if key[0] == math.inf or key >= (self.value, finite(self.val_loss)):
            return False
        self.value, self.epoch = key[0], metrics["epoch"]
        self.val_loss, self.val_accuracy = metrics.get("val_loss"), metrics.get("val_accuracy")
        self.others = {k: v for k, v in metrics.items() if split_of(k) == "val" and k not in self.metrics}
        return True

    @property
    def metrics(self) -> dict[str, float | None]:
        """Loss and accuracy of the best evaluation, by column."""
        return {VAL_LOSS.column: self.val_loss, VAL_ACCURACY.column: self.val_accuracy}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in state:
            setattr(self, "others" if name == "on_sets" else name, state[name])  # the name in earlier checkpoints
