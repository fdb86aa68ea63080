"""One optimizer update: forward and backward through the parallel mode, clipping, the update, and what follows it.

Every optimizer is driven through `optimizer.step(closure)`, so that gradient descent, L-BFGS, SAM and Newton with a
line search share one loop; the closure is the step itself. An optimizer that evaluates once per update gets its
gradients first and then steps without the closure: a non-finite gradient is detected before it reaches the weights, and
the gradient scaler, which takes no closure, can make the update.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from dlopt.parallel.mode import EpochBatches, MetricRecord, Mode
from dlopt.random import stream
from dlopt.schedules import Scheduler
from dlopt.training.clipping import Clip, Unclipped, gradient_norm
from dlopt.training.metrics import MetricSum
from dlopt.training.nonfinite import Diverged, NonFiniteCheck, check_weights, locate
from dlopt.training.precision import Precision

log = logging.getLogger(__name__)

_AS_IT_IS = nullcontext()


@dataclass(frozen=True)
class Network:
    """A model with its loss."""

    module: nn.Module
    model: Callable[[Tensor], Tensor]  # how the module is called: placed, compiled
    loss: Callable[[Tensor, Tensor], Tensor]  # mean over the samples


@dataclass(frozen=True)
class StepSettings:
    """
    accumulate: micro-batches per update.
    seed: of the model's random draws (dropout).
    evaluates_once: whether the optimizer evaluates the loss once per update.
    check_now: check for non-finite values in every step, before the update: cheap on a CPU, a synchronization on a GPU.
    halve_on_out_of_memory: split a batch that does not fit into twice as many micro-batches, and keep doing so.
    """

    accumulate: int = 1
    seed: int = 0
    evaluates_once: bool = True
    check_now: bool = True
    halve_on_out_of_memory: bool = False


class Observer:
    """Watches updates and must not change what they compute (diagnostics, profiler). By default a hook does nothing."""

    def instrument(self, network: Network, batches: EpochBatches) -> tuple[Network, EpochBatches]:
        """Returns the network and the training batches as the run is to use them."""
        return network, batches

    def around(self, step: "Step", inputs: Tensor, targets: Tensor, number: int) -> AbstractContextManager[None] | None:
        """Returns a context for update `number` (from 0) on this batch; None: this update is not watched."""
        return None

    def evaluation_begins(self) -> None:
        """Called before each forward and backward pass of the batch."""

    def evaluation_ends(self) -> None:
        """Called after it: the reduced, unscaled, not yet clipped gradients are in the parameters."""


class Step:
    """`step.update(...)` makes one update; `step()` is the closure that the optimizer evaluates.

    Within an update the random draws of the model are frozen, and batch-norm statistics move with the first evaluation
    only: an optimizer that evaluates many times always sees the same function.

    Args:
        schedule: stepped after every update.
        mode: drives forward and backward (`Mode.forward_backward` calls `micro_batch`).
        clip: clips the reduced gradients.
        after: called after every update (weight averaging, buffer synchronization, stopping rules).
        skip: decides whether an update whose gradients are not finite is left out; None: it is an error.
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
        after: Sequence[Callable[[], None]] = (),
        skip: Callable[[Diverged], bool] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.module = network.module
        self.optimizer = optimizer
        self.schedule = schedule
        self.mode = mode
        self.settings = settings
        self.clip = Unclipped() if clip is None else clip
        self.after = after
        self.skip = skip
        self.observers = observers
        self.scaler = precision.scaler()
        self.accumulate = settings.accumulate
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.rate = schedule.rate  # of the latest update
        self.norm: Tensor | None = None  # of its gradient, before clipping, where it was computed
        self.check = NonFiniteCheck(
            self.parameters,
            at_once=settings.check_now,
            where=self._locate,
            norm=None if mode.sharding == "replicated" else mode.norm,
        )
        self._model = precision.autocast(network.model)
        self._loss = precision.autocast(network.loss)
        self._generators = _generators(self.parameters) if may_draw(network.module) else []
        may_withdraw = skip is not None or settings.halve_on_out_of_memory
        self._buffers = _BufferBackup(network.module) if may_withdraw else None
        self._record: MetricRecord | None = None  # of the update's first evaluation, until it is done

    # -- the update

    def update(self, inputs: Tensor, targets: Tensor, number: int, sums: MetricSum, *, log_norm: bool = False) -> None:
        """Makes update `number` (from 0) on this rank's samples of a batch and adds its loss and outputs to `sums`.

        `log_norm`: compute `norm`, the norm of the gradient before clipping. Raises `Diverged`.
        """
        with self._observed(inputs, targets, number) if self.observers else _AS_IT_IS:
            self.begin(inputs, targets, number, sums, log_norm=log_norm)
            try:
                if not self.settings.evaluates_once:
                    self.optimizer.step(self)  # type: ignore[arg-type]
                else:
                    self()
                    if self.scaler is None:
                        self.optimizer.step()
                    else:
                        self.scaler.step(self.optimizer)
                        self.scaler.update()
            except Diverged as error:
                if self.skip is None or not error.before_update or not self.skip(error):
                    raise
                self._withdraw(sums)
            self.schedule.step()
            for follow in self.after:
                follow()

    def begin(self, inputs: Tensor, targets: Tensor, number: int, sums: MetricSum, *, log_norm: bool = False) -> None:
        """Sets the batch of update `number`; its first evaluation is added to `sums`."""
        self.batch = inputs, targets
        self.number = number
        self.rate = self.schedule.rate
        self._log_norm = log_norm
        self._record = sums
        if self._buffers is not None:
            sums.begin()
            self._buffers.keep()
        if self._generators:
            self._draws = stream(self.settings.seed, number)

    def __call__(self) -> Tensor:
        """Leaves the clipped gradients of the batch's mean loss in the parameters; returns that loss, detached."""
        record, self._record = self._record, None
        self.optimizer.zero_grad()
        for observer in self.observers:
            observer.evaluation_begins()
        with frozen_statistics(self.module) if record is None else _AS_IT_IS:
            while True:
                self._seed()
                try:
                    loss = self.mode.forward_backward(self, *self.batch, record)
                    break
                except torch.OutOfMemoryError:
                    if not self.settings.halve_on_out_of_memory or self.accumulate >= len(self.batch[1]):
                        raise
                # Outside the except clause: the exception's traceback would keep the activations alive.
                self._halve(record)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if record is not None:
            self.check(loss, self.number, self.rate, gradients=self.scaler is None)
        for observer in self.observers:
            observer.evaluation_ends()
        self.norm = self._clip_gradients(self._log_norm)
        return loss

    def loss(self) -> Tensor:
        """Returns the batch's mean loss with its graph and without a backward pass: for Hessian-vector products."""
        with torch.enable_grad(), frozen_statistics(self.module):
            self._seed()
            return self.mode.differentiable_loss(self, *self.batch)

    # -- what the mode calls (see `dlopt.parallel.mode.MicroSteps`)

    def micro_batch(self, inputs: Tensor, targets: Tensor, weight: float, record: MetricRecord | None) -> Tensor:
        outputs = self._model(inputs)
        loss = self._loss(outputs, targets)
        value = loss.detach()
        if record is not None:
            record.add(value, outputs.detach(), targets)
        if weight != 1.0:
            loss, value = loss * weight, value * weight
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return value

    def empty_micro_batch(self, inputs: Tensor, record: MetricRecord | None) -> Tensor:
        if record is not None:
            record.add_nothing(inputs.device)
        loss = self._model(inputs).sum() * 0.0
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def micro_loss(self, outputs: Tensor, targets: Tensor, record: MetricRecord | None) -> Tensor:
        loss = self._loss(outputs, targets)
        if record is not None:
            record.add(loss.detach(), outputs.detach(), targets)
        return loss

    def differentiable_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(self._model(inputs), targets)

    # -- checks and state

    def check_updates(self) -> None:
        """Raises `Diverged` when an update since the last check was not finite. Synchronizes with the device."""
        self.check.look(self.scaler)

    def check_weights(self) -> None:
        """The same for the present weights, which a finite gradient may have moved too far."""
        self.check_updates()
        check_weights(self.module, self.check.latest, float(self.rate), self.check.norm)

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"lr": float(self.rate), "scaler": scaler, "accumulate": self.accumulate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rate = state["lr"]
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.settings.halve_on_out_of_memory:
            self.accumulate = max(self.accumulate, state["accumulate"])  # what did not fit will not fit now

    # -- parts of an update

    @contextmanager
    def _observed(self, inputs: Tensor, targets: Tensor, number: int) -> Iterator[None]:
        contexts = [each.around(self, inputs, targets, number) for each in self.observers]
        with ExitStack() as stack:
            for context in contexts:
                if context is not None:
                    stack.enter_context(context)
            yield

    def _seed(self) -> None:
        """Every evaluation of an update draws the same numbers, and a resumed run those of an uninterrupted one."""
        for generator in self._generators:
            generator.manual_seed(self._draws)

    def _clip_gradients(self, log_norm: bool) -> Tensor | None:
        """Returns the norm before clipping where clipping or logging needs it."""
        norm = gradient_norm(self.parameters, self.mode.norm) if log_norm else None
        clipped = self.clip(self.parameters, self.mode.norm)
        return norm if clipped is None else clipped

    def _withdraw(self, sums: MetricSum) -> None:
        sums.withdraw()
        if self._buffers is not None:
            self._buffers.restore()

    def _halve(self, record: MetricRecord | None) -> None:
        """Releases what the failed evaluation has left, and uses twice as many micro-batches from here on."""
        self.optimizer.zero_grad()
        if isinstance(record, MetricSum):
            self._withdraw(record)
        if self.batch[1].is_cuda:
            torch.cuda.empty_cache()
        self.accumulate *= 2
        size = -(-len(self.batch[1]) // self.accumulate)
        log.warning("out of memory at update %d: micro-batches of %d samples from here on", self.number + 1, size)

    def _locate(self, loss_is_finite: bool) -> str:
        return locate(self.module, self.batch[0], self.mode, self.loss, loss_is_finite=loss_is_finite)


class _BufferBackup:
    """Running statistics, which an update that is withdrawn must not have moved."""

    def __init__(self, module: nn.Module) -> None:
        self._now = [each for each in module.buffers() if not each.is_meta]
        self._before = [each.clone() for each in self._now]

    def keep(self) -> None:
        if self._now:
            torch._foreach_copy_(self._before, self._now)

    def restore(self) -> None:
        if self._now:
            torch._foreach_copy_(self._now, self._before)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within, batch norm normalizes with the batch's statistics and leaves its running statistics unchanged."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
        norm.momentum = 0.0  # instance norm updates its statistics whatever track_running_stats says
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.track_running_stats = True
            norm.momentum = momentum


_DRAWING = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def may_draw(module: nn.Module) -> bool:
    """Whether the model's forward may draw random numbers: torch's layers that do, and all unknown ones.

    Seeding a generator is cheap, and yet it evicts a tiny model from the processor's cache: a tenth of its step.
    """
    return any(_draws(each) for each in module.modules())


def _draws(layer: nn.Module) -> bool:
    if isinstance(layer, _DropoutNd):
        return layer.p > 0
    rate = getattr(layer, "dropout", 0)  # of recurrent and attention layers
    known = type(layer).__module__.startswith(("torch.nn.", "dlopt.models."))
    return not known or isinstance(layer, _DRAWING) or (isinstance(rate, float) and rate > 0)


def _generators(parameters: Sequence[Tensor]) -> list[torch.Generator]:
    """Returns the generators from which dropout draws on the devices of the parameters."""
    generators = [torch.default_generator]
    device = next((p.device for p in parameters if p.is_cuda), None)
    if device is not None:
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators
