"""Updates replayed from a CUDA graph: small models at small batches are bound by launching kernels one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.graphs import Recorder, Replayed
from dlopt.parallel.mode import Mode
from dlopt.schedules import Scheduler
from dlopt.training.metrics import MetricSum
from dlopt.training.precision import Precision
from dlopt.training.step import Step, StepSettings

_FUSED_OPTIMIZERS = ("SGD", "Adam", "AdamW")  # of torch.optim, with one kernel for all parameters


def obstacle(
    module: nn.Module,
    optimizer: Optimizer,
    schedule: Scheduler,
    mode: Mode,
    settings: StepSettings,
    *,
    precision: Precision,
    observed: bool = False,
) -> str | None:
    """Why updates cannot be captured, in words; None: they can.

    A captured update must not depend on the values in it, must not wait for the device, and must not change from step
    to step but for tensors and seeds. torch's and dlopt's layers are like that; other layers may not be.
    """
    if mode.device.type != "cuda":
        return f"there are none on {mode.device.type}"
    if mode.processes > 1:
        return "several processes meet within an update"
    if observed:
        return "diagnostics or a profile look into the updates"
    if not settings.evaluates_once or not _is_capturable(optimizer):
        return f"{type(optimizer).__name__} decides on the host"
    if precision.name == "fp16":
        return "the loss scale of precision=fp16 is decided on the host"
    if settings.check_now:
        return "check=step and on_divergence=skip look at every update before it is made"
    if settings.halve_on_out_of_memory:
        return "on_out_of_memory=halve may change the micro-batches"
    if schedule.cycles_momentum:
        return "the schedule changes the momentum"
    for layer in module.modules():
        known = type(layer).__module__.startswith(("torch.nn.", "dlopt.models."))
        if not known or isinstance(layer, nn.RNNBase):  # cuDNN keeps states of its own
            return f"of {type(layer).__name__} it is not known whether it decides on the host"
    return None


def _is_capturable(optimizer: Optimizer) -> bool:
    if getattr(optimizer, "capturable", False):  # dlopt's own optimizers declare it
        return True
    torchs = type(optimizer).__module__.startswith("torch.") and type(optimizer).__name__ in _FUSED_OPTIMIZERS
    return torchs and all(group.get("fused") for group in optimizer.param_groups)


@dataclass(frozen=True)
class Capture:
    """
    size: samples of the batches whose updates are captured; others, such as an epoch's last one, run uncaptured.
    log_norm: capture the norm of the gradient as well, for logging.
    inside: those of the step's `after` that belong into the graph (weight averaging).
    """

    recorder: Recorder
    size: int
    log_norm: bool = False
    inside: Sequence[Callable[[], None]] = ()


class GraphedStep(Step):
    """A step that runs a few updates as they are, then captures one, and replays it from there on.

    Forward, backward, clipping, the optimizer's update and `Capture.inside` are one graph. A graph reads and writes
    fixed memory, and none of its Python runs again. Therefore: a batch is copied to where the captured update reads it;
    learning rates are tensors, which the schedule fills in place; dropout is seeded before each replay, so that its
    draws are those of a step without a graph; losses and outputs are cloned before the next replay overwrites them.
    """

    def __init__(self, *arguments: Any, capture: Capture, **keys: Any) -> None:
        super().__init__(*arguments, **keys)
        device = self.parameters[0].device
        self._capture = capture
        self._outside = [follow for follow in self.after if follow not in capture.inside]
        self._replayed = Replayed("the update", self._work, capture.recorder)
        self._static: tuple[Tensor, Tensor] | None = None  # the inputs and targets that the graph reads
        self._flag = torch.zeros((), device=device)  # whether a gradient was not finite
        self._frozen = 0
        self._rates = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        self._restore(self.optimizer)
        self.optimizer.register_state_dict_post_hook(_with_plain_rates)
        self.optimizer.register_load_state_dict_post_hook(self._restore)

    def update(self, inputs: Tensor, targets: Tensor, number: int, sums: MetricSum, *, log_norm: bool = False) -> None:
        if not self._take(inputs, targets):
            super().update(inputs, targets, number, sums, log_norm=log_norm)
            return
        self.begin(inputs, targets, number, sums, log_norm=log_norm)
        if self.schedule.frozen != self._frozen:  # other parameters than before require gradients
            self._frozen = self.schedule.frozen
            self._replayed.forget()
        self._seed()
        results = self._replayed()
        for part in results.parts:
            sums.add(*(each.clone() for each in part))
        self.check.hold(results.loss.clone(), number, self.rate, results.flag.clone())
        self.norm = results.norm
        self.schedule.step()
        for follow in self._outside:
            follow()

    def _work(self) -> "_Results":
        """What is captured: the update of the static batch. Seeding and metrics stay on the host."""
        assert self._static is not None
        results = _Results(flag=self._flag)
        self.optimizer.zero_grad()
        results.loss = self.mode.forward_backward(self, *self._static, results)
        self._flag.zero_()
        self.check.find(self._flag)
        results.norm = self._clip_gradients(self._capture.log_norm)
        self.optimizer.step()
        for follow in self._capture.inside:
            follow()
        return results

    def _take(self, inputs: Tensor, targets: Tensor) -> bool:
        """Copies a batch to where the graph reads it; False where it does not fit there."""
        if self._static is None:
            if len(targets) != self._capture.size:
                return False
            self._static = torch.empty_like(inputs), torch.empty_like(targets)
        for place, value in zip(self._static, (inputs, targets), strict=True):
            if place.shape != value.shape or place.dtype != value.dtype:
                return False
        self._static[0].copy_(inputs)
        self._static[1].copy_(targets)
        return True

    def _restore(self, optimizer: Optimizer) -> None:
        """Keeps the learning rates in the same tensors, also after a state is loaded. Its tensors are not those that
        were captured, so that the update is captured anew."""
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate.fill_(float(group["lr"]))
            if "capturable" in group:
                group["capturable"] = True
        self._replayed.forget()


@dataclass
class _Results:
    """Tensors that every replay overwrites: losses and outputs of the micro-batches, in place of a `MetricSum`."""

    flag: Tensor
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # loss, outputs, targets
    norm: Tensor | None = None
    loss: Tensor = field(init=False)

    def add(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.parts.append((loss, outputs, targets))

    def add_nothing(self, device: torch.device) -> None:
        raise AssertionError("one process has samples of every micro-batch")


def _with_plain_rates(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """A saved state holds learning rates as numbers, like that of any other run."""
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
