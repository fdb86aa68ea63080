"""Replays updates from a CUDA graph: the speed of small models on small batches is limited by kernel launches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.graphs import GraphedFunction, Recorder
from dlopt.optim.traits import optimizer_traits
from dlopt.parallel.mode import Mode
from dlopt.schedules import Scheduler
from dlopt.training.metrics import MetricSum
from dlopt.training.precision import Precision
from dlopt.training.step import Step, StepSettings


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
    """Returns why updates cannot be captured; None: they can.

    A captured update has no control flow that depends on tensor values, does not synchronize with the device, and
    differs between steps only in tensors and seeds. This is known of torch's and dlopt's layers only.
    """
    if mode.device.type != "cuda":
        return f"CUDA graphs are not available on {mode.device.type}"
    if mode.processes > 1:
        return "an update communicates between processes"
    if observed:
        return "diagnostics and profile use hooks, which a replay does not run"
    if not settings.evaluates_once or not optimizer_traits(optimizer).capturable:
        return f"{type(optimizer).__name__} has control flow on the host"
    if precision.name == "fp16":
        return "precision=fp16 adapts its loss scale on the host"
    if settings.check_now:
        return "check=step and on_divergence=skip synchronize in every update"
    if settings.halve_on_out_of_memory:
        return "on_out_of_memory=halve may change the size of micro-batches"
    if schedule.cycles_momentum:
        return "the schedule changes the momentum, which is a constant in a graph"
    for layer in module.modules():
        known = type(layer).__module__.startswith(("torch.nn.", "dlopt.models."))
        if not known or isinstance(layer, nn.RNNBase):  # cuDNN keeps dropout states of its own
            return f"{type(layer).__name__} may have control flow on the host"
    return None


@dataclass(frozen=True)
class Capture:
    """Settings of the capture.

    Attributes:
        batch_size: samples in a captured batch; other batches, such as the last one of an epoch, run eagerly.
        log_norm: also capture the gradient norm, for logging.
        post_hooks: the step's `post_hooks` that are part of the graph (weight averaging, if its decay is constant).
    """

    recorder: Recorder
    batch_size: int
    log_norm: bool = False
    post_hooks: Sequence[Callable[[], None]] = ()


class GraphedStep(Step):
    """A step that runs the first updates eagerly, then captures one, and replays it for all others.

    One graph holds forward, backward, clipping, the optimizer's update and `Capture.post_hooks`. A replay uses the
    captured memory addresses and runs no Python. Therefore:

    - each batch is copied into static input tensors;
    - learning rates are tensors, which the schedule fills in place;
    - dropout is seeded before each replay, which makes it bitwise identical to that of an eager step;
    - losses and outputs are cloned before the next replay overwrites them.
    """

    def __init__(self, *arguments: Any, capture: Capture, **keys: Any) -> None:
        super().__init__(*arguments, **keys)
        device = self.parameters[0].device
        self._capture = capture
        self._eager_hooks = [hook for hook in self.post_hooks if hook not in capture.post_hooks]
        self._graphed_update = GraphedFunction("the update", self._captured_update, capture.recorder)
        self._static: tuple[Tensor, Tensor] | None = None  # the graph's inputs and targets
        self._flag = torch.zeros((), device=device)  # set by the graph if a gradient is not finite
        self._frozen = 0
        self._rates = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        self._use_rate_tensors(self.optimizer)
        self.optimizer.register_state_dict_post_hook(_convert_rates_to_floats)
        self.optimizer.register_load_state_dict_post_hook(self._use_rate_tensors)

    def update(
        self, inputs: Tensor, targets: Tensor, number: int, metrics: MetricSum, *, log_norm: bool = False
    ) -> None:
        if not self._copy_batch(inputs, targets):
            super().update(inputs, targets, number, metrics, log_norm=log_norm)
            return
        self.begin(inputs, targets, number, metrics, log_norm=log_norm)
        if self.schedule.frozen != self._frozen:  # the schedule froze parameters: the backward pass has changed
            self._frozen = self.schedule.frozen
            self._graphed_update.reset()
        self._seed()
        record = self._graphed_update()
        for tensors in record.micro_batches:
            metrics.add(*(tensor.clone() for tensor in tensors))
        self.check.defer(record.loss.clone(), number, self.rate, record.flag.clone())
        self.norm = record.norm
        self.schedule.step()
        for hook in self._eager_hooks:
            hook()
        if self.after_step is not None:  # graphs have no gradient scaler
            self.after_step()

    def _captured_update(self) -> "_StaticRecord":
        """Runs the update on the static batch. Seeding and metric accumulation stay on the host."""
        assert self._static is not None
        record = _StaticRecord(flag=self._flag)
        self.optimizer.zero_grad()
        record.loss = self.mode.forward_backward(self, *self._static, record)
        self._flag.zero_()
        self.check.flag_nonfinite(self._flag)
        record.norm = self._clip_gradients(self._capture.log_norm)
        self.optimizer.step()
        for hook in self._capture.post_hooks:
            hook()
        return record

    def _copy_batch(self, inputs: Tensor, targets: Tensor) -> bool:
        """Copies a batch into the static tensors; returns False if its shape or dtype differs from theirs."""
        if self._static is None:
            if len(targets) != self._capture.batch_size:
                return False
            self._static = torch.empty_like(inputs), torch.empty_like(targets)
        for static, tensor in zip(self._static, (inputs, targets), strict=True):
            if static.shape != tensor.shape or static.dtype != tensor.dtype:
                return False
        self._static[0].copy_(inputs)
        self._static[1].copy_(targets)
        return True

    def _use_rate_tensors(self, optimizer: Optimizer) -> None:
        """Puts the learning rates into the static tensors, at the start and after a state is loaded.

        Loading replaces the optimizer's state tensors: the update has to be captured again.
        """
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate.fill_(float(group["lr"]))
            if "capturable" in group:
                group["capturable"] = True
        self._graphed_update.reset()


@dataclass
class _StaticRecord:
    """A `MetricRecord` of the tensors that every replay overwrites."""

    flag: Tensor
    micro_batches: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # loss, outputs, targets
    norm: Tensor | None = None
    loss: Tensor = field(init=False)

    def add(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.micro_batches.append((loss, outputs, targets))

    def add_empty(self, device: torch.device) -> None:
        raise AssertionError("with one process no micro-batch is empty")


def _convert_rates_to_floats(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Makes a saved state independent of CUDA graphs: it can be loaded by a run without them."""
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
