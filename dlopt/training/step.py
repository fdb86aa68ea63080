"""One training step: forward, backward, non-finite check, clipping, optimizer, schedule, hooks.

All optimizers (gradient descent, L-BFGS, SAM, Newton with a line search) share one code path: the step itself is the
closure of `optimizer.step(closure)`. For an optimizer that evaluates the loss once per update, the closure runs first,
and the optimizer then steps without it. This is what allows gradient scaling: `GradScaler.step` accepts no closure.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from dlopt.losses import sampled_cross_entropy
from dlopt.optim.traits import optimizer_traits
from dlopt.parallel.mode import EpochBatches, MetricRecord, Mode
from dlopt.parallel.shards import local
from dlopt.random import stream
from dlopt.schedules import Scheduler
from dlopt.training.clipping import Clip, Unclipped, gradient_norm
from dlopt.training.metrics import MetricSum
from dlopt.training.nonfinite import Diverged, NonFiniteCheck, check_weights, locate
from dlopt.training.precision import Precision

log = logging.getLogger(__name__)

_NO_CONTEXT = nullcontext()


@dataclass(frozen=True)
class Network:
    """A model with its loss."""

    module: nn.Module
    model: Callable[[Tensor], Tensor]  # calls the module: wrapped by the parallel mode, compiled
    loss: Callable[[Tensor, Tensor], Tensor]  # mean over the samples


@dataclass(frozen=True)
class StepSettings:
    """Settings of a step.

    Attributes:
        accumulate: micro-batches per update.
        seed: of the model's random numbers (dropout).
        evaluates_once: whether the optimizer evaluates the loss once per update.
        check_now: check for non-finite values before each update: cheap on a CPU, a synchronization on a GPU.
        halve_on_out_of_memory: when a batch does not fit, use twice as many micro-batches from then on.
    """

    accumulate: int = 1
    seed: int = 0
    evaluates_once: bool = True
    check_now: bool = True
    halve_on_out_of_memory: bool = False


class Observer:
    """Base of diagnostics and profiler: observes updates and must not change their results."""

    def instrument(self, network: Network, batches: EpochBatches) -> tuple[Network, EpochBatches]:
        """Returns the network and the training batches, possibly wrapped."""
        return network, batches

    def around(self, step: "Step", inputs: Tensor, targets: Tensor, number: int) -> AbstractContextManager[None] | None:
        """Returns a context manager for update `number` (from 0) on this batch; None: do not observe this update."""
        return None

    def before_evaluation(self) -> None:
        """Called before each forward and backward pass of a batch."""

    def after_evaluation(self) -> None:
        """Called after each backward pass; gradients are reduced and unscaled, but not clipped."""

    def after_clipping(self) -> None:
        """Called after each clipping, before the optimizer, which may overwrite the gradients."""


class Step:
    """`step.update(...)` runs one update; `step()` is the closure that the optimizer evaluates.

    An optimizer may evaluate the closure many times per update, and must see the same function each time. Therefore
    every evaluation of an update uses the same random numbers, and only the first one updates batch-norm statistics.

    Args:
        schedule: stepped after every update.
        mode: runs forward and backward (`Mode.forward_backward` calls `micro_batch`).
        clip: clips the reduced gradients.
        post_hooks: called after every update that was not skipped (buffer synchronization, weight averaging, stopping
            rules).
        skip: decides whether to skip an update with non-finite gradients; None: raise the error.
    """

    def __init__(
        self,
        network: Network,
        optimizer: Optimizer,
        schedule: Scheduler,
        mode: Mode,
        settings: StepSettings,
        *,
        precision: Precision,
        clip: Clip | None = None,
        post_hooks: Sequence[Callable[[], None]] = (),
        after_step: Callable[[], None] | None = None,
        skip: Callable[[Diverged], bool] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.module = network.module
        self.optimizer = optimizer
        self.schedule = schedule
        self.mode = mode
        self.settings = settings
        self.clip = Unclipped() if clip is None else clip
        self.post_hooks = post_hooks
        self.after_step = after_step
        self.skip = skip
        self.observers = observers
        self.scaler = precision.scaler()
        self.accumulate = settings.accumulate
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.rate = schedule.rate  # learning rate of the latest update
        self.norm: Tensor | None = None  # norm of its gradient before clipping, if computed
        self.check = NonFiniteCheck(
            self.parameters,
            immediate=settings.check_now,
            locate=self._locate,
            norm=None if mode.sharding == "replicated" else mode.norm,
        )
        self._model = precision.autocast(network.model)
        self._eager_model = precision.autocast(network.module)
        self._loss = precision.autocast(network.loss)
        self._sampled_loss = precision.autocast(sampled_cross_entropy)
        self._generators = _generators(self.parameters) if is_stochastic(network.module) else []
        self._checks_all = optimizer_traits(optimizer).uses_all_gradients
        self._may_undo = skip is not None or settings.halve_on_out_of_memory
        buffers = network.module.buffers() if self._may_undo else ()
        self._buffers = [local(buffer) for buffer in buffers if not buffer.is_meta]  # batch-norm statistics
        self._saved_buffers = [buffer.clone() for buffer in self._buffers]
        self._scale = None if self.scaler is None or after_step is None else self.scaler.get_scale()
        self._record: MetricRecord | None = None  # until the update's first evaluation has used it
        self._evaluations = 0  # of the loss, in all updates of the run

    # -- the update

    def update(
        self, inputs: Tensor, targets: Tensor, number: int, metrics: MetricSum, *, log_norm: bool = False
    ) -> None:
        """Runs update `number` (from 0) on this rank's samples of a batch; adds its loss and outputs to `metrics`.

        `log_norm`: compute `norm`, the norm of the gradient before clipping. Raises `Diverged`.
        """
        with self._observed(inputs, targets, number) if self.observers else _NO_CONTEXT:
            self.begin(inputs, targets, number, metrics, log_norm=log_norm)
            skipped = False
            try:
                if not self.settings.evaluates_once:
                    self.optimizer.step(self)  # type: ignore[arg-type]
                else:
                    self()  # raises `Diverged` before the optimizer changes the weights
                    if self.scaler is None:
                        self.optimizer.step()
                    else:
                        self.scaler.step(self.optimizer)
                        self.scaler.update()
            except Diverged as error:
                if self.skip is None or not error.before_update or not self.skip(error):
                    raise
                self._undo_evaluation(metrics)
                skipped = True
            # A skipped update counts: schedule, data and seeds depend on the update's number only.
            self.schedule.step()
            for hook in () if skipped else self.post_hooks:
                hook()
            if self.after_step is not None and not (skipped or self._was_skipped_by_scaler()):
                self.after_step()

    def _was_skipped_by_scaler(self) -> bool:
        """Returns whether the gradient scaler has skipped this update: then it reduces its scale. Synchronizes."""
        if self.scaler is None:
            return False
        former, self._scale = self._scale, self.scaler.get_scale()
        return former is not None and self._scale < former

    def begin(
        self, inputs: Tensor, targets: Tensor, number: int, metrics: MetricSum, *, log_norm: bool = False
    ) -> None:
        """Sets the batch of update `number`, whose first evaluation is added to `metrics`."""
        self.batch = inputs, targets
        self.number = number
        self.rate = self.schedule.rate
        self._log_norm = log_norm
        self._record = metrics
        if self._may_undo:
            metrics.begin_update()
            if self._buffers:
                torch._foreach_copy_(self._saved_buffers, self._buffers)
        if self._generators:
            self._draw_seed = stream(self.settings.seed, number)

    def __call__(self) -> Tensor:
        """Computes the mean loss of the batch, returned detached, and its clipped gradients, in the parameters."""
        record, self._record = self._record, None
        self._evaluations += 1
        self.optimizer.zero_grad()
        for observer in self.observers:
            observer.before_evaluation()
        with frozen_statistics(self.module) if record is None else _NO_CONTEXT:
            while True:
                self._seed()
                try:
                    loss = self.mode.forward_backward(self, *self.batch, record)
                    break
                except torch.OutOfMemoryError:
                    if not self.settings.halve_on_out_of_memory or self.accumulate >= len(self.batch[1]):
                        raise
                # Outside the except clause, in which the exception's traceback would keep the activations alive.
                self._halve_micro_batches(record)
        # The order matters: clipping needs unscaled gradients, and would turn one non-finite entry into many. With a
        # scaler non-finite gradients are normal: it skips the update and reduces its scale.
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if record is not None or self._checks_all:
            self.check(loss, self.number, self.rate, gradients=self.scaler is None)
        for observer in self.observers:
            observer.after_evaluation()
        self.norm = self._clip_gradients(self._log_norm)
        for observer in self.observers:
            observer.after_clipping()
        return loss

    def loss(self) -> Tensor:
        """Returns the batch's mean loss with its autograd graph, without backward: for Hessian-vector products."""
        self._evaluations += 1
        # Fused attention kernels have no second derivatives.
        with torch.enable_grad(), frozen_statistics(self.module), sdpa_kernel(SDPBackend.MATH):
            self._seed()
            return self.mode.differentiable_loss(self, *self.batch)

    def sampled_loss(self, seed: int) -> tuple[Tensor, int]:
        """Returns the mean cross-entropy, with its graph, for classes drawn from the model's predictions on the batch,
        and the number of predictions.

        Each prediction has its own random number, so that the draw does not depend on the micro-batches.
        """
        self._evaluations += 1
        inputs, targets = self.batch
        shape = targets.shape[:1] if targets.is_floating_point() else targets.shape  # mixed labels: [B, K]
        draw = torch.Generator(targets.device).manual_seed(seed)
        noise = torch.rand(shape, generator=draw, device=targets.device)
        sampling = copy(self)
        sampling._loss = self._sampled_loss
        with torch.enable_grad(), frozen_statistics(self.module):
            self._seed()
            return self.mode.differentiable_loss(sampling, inputs, noise), noise.numel()

    # -- called by the parallel mode (see `dlopt.parallel.mode.MicroSteps`)

    def micro_batch(self, inputs: Tensor, targets: Tensor, weight: float, record: MetricRecord | None) -> Tensor:
        loss = self.micro_loss(self._model(inputs), targets, record)
        if weight != 1.0:
            loss = loss * weight
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def empty_micro_batch(self, inputs: Tensor, record: MetricRecord | None) -> Tensor:
        if record is not None:
            record.add_empty(inputs.device)
        loss = self._model(inputs).sum() * 0.0
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def micro_loss(self, outputs: Tensor, targets: Tensor, record: MetricRecord | None) -> Tensor:
        loss = self._loss(outputs, targets)
        if record is not None:
            record.add(loss.detach(), outputs.detach(), targets)
        return loss

    def differentiable_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(self._eager_model(inputs), targets)  # torch.compile has no second derivatives

    # -- checks and state

    def check_updates(self) -> None:
        """Raises `Diverged` if an update since the last check was not finite. Synchronizes with the device."""
        self.check.flush(self.scaler)

    def check_weights(self) -> None:
        """Also checks the weights, which a finite gradient may have made non-finite."""
        self.check_updates()
        check_weights(self.module, self.check.latest, float(self.rate), self.check.norm)

    def cost(self) -> dict[str, int]:
        """Returns the evaluations of the loss so far, for optimizers with several per update; otherwise nothing."""
        return {} if self.settings.evaluates_once else {"evaluations": self._evaluations}

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"lr": float(self.rate), "scaler": scaler, "accumulate": self.accumulate, **self.cost()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rate = state["lr"]
        self._evaluations = state.get("evaluations", 0)
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.settings.halve_on_out_of_memory:
            self.accumulate = max(self.accumulate, state["accumulate"])  # do not run out of memory again

    # -- parts of an update

    @contextmanager
    def _observed(self, inputs: Tensor, targets: Tensor, number: int) -> Iterator[None]:
        contexts = [observer.around(self, inputs, targets, number) for observer in self.observers]
        with ExitStack() as stack:
            for context in contexts:
                if context is not None:
                    stack.enter_context(context)
            yield

    def _seed(self) -> None:
        """Gives all evaluations of an update the same random numbers, which depend on its number only (resuming)."""
        for generator in self._generators:
            generator.manual_seed(self._draw_seed)

    def _clip_gradients(self, log_norm: bool) -> Tensor | None:
        """Returns the norm before clipping if clipping or logging needs it."""
        norm = gradient_norm(self.parameters, self.mode.norm) if log_norm else None
        clipped = self.clip(self.parameters, self.mode.norm)
        return norm if clipped is None else clipped

    def _undo_evaluation(self, metrics: MetricSum) -> None:
        metrics.discard_update()
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved_buffers)

    def _halve_micro_batches(self, record: MetricRecord | None) -> None:
        """Undoes the failed evaluation, frees its memory, and doubles the number of micro-batches."""
        self.optimizer.zero_grad()
        if isinstance(record, MetricSum):
            self._undo_evaluation(record)
        if self.batch[1].is_cuda:
            torch.cuda.empty_cache()
        self.accumulate *= 2
        size = -(-len(self.batch[1]) // self.accumulate)
        log.warning("out of memory at update %d: continuing with micro-batches of %d samples", self.number + 1, size)

    def _locate(self, loss_is_finite: bool) -> str:
        return locate(self.module, self.batch[0], self.mode, self.loss, loss_is_finite=loss_is_finite)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which batch norm uses the batch's statistics and does not update its running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
        norm.momentum = 0.0  # instance norm ignores track_running_stats
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.track_running_stats = True
            norm.momentum = momentum


_RANDOM_LAYERS = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def is_stochastic(module: nn.Module) -> bool:
    """Returns whether the forward pass may draw random numbers. Layers that are not torch's or dlopt's count as random.

    Seeding costs a tiny model 10 % of its step: the generator's state evicts the model from the CPU cache.
    """
    return any(_is_random(layer) for layer in module.modules())


def _is_random(layer: nn.Module) -> bool:
    if isinstance(layer, _DropoutNd):
        return layer.p > 0
    rate = getattr(layer, "dropout", 0)  # recurrent and attention layers
    is_known = type(layer).__module__.startswith(("torch.nn.", "dlopt.models."))
    return not is_known or isinstance(layer, _RANDOM_LAYERS) or (isinstance(rate, float) and rate > 0)


def _generators(parameters: Sequence[Tensor]) -> list[torch.Generator]:
    """Returns the default generators of the parameters' device and of the CPU."""
    device = next((p.device for p in parameters if p.is_cuda), None)
    of_device = [] if device is None else [torch.cuda.default_generators[device.index or 0]]
    return [torch.default_generator, *of_device]
