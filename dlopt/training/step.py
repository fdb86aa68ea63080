"""One training step: forward, backward, non-finite check, clipping, optimizer, schedule, hooks.

All optimizers (gradient descent, L-BFGS, SAM, Newton with a line search) share one code path: the step itself is the
closure of `optimizer.step(closure)`. For an optimizer that evaluates the loss once per update, the closure runs first,
and the optimizer then steps without it. This is what allows gradient scaling: `GradScaler.step` accepts no closure.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from dlopt.basics.errors import UserError
from dlopt.basics.random import stream
from dlopt.data.batches import Batch
from dlopt.losses import sampled_cross_entropy
from dlopt.metrics.sums import Measure, Measured
from dlopt.models.known import is_stochastic
from dlopt.optim.traits import optimizer_traits
from dlopt.parallel.mode import Mode
from dlopt.parallel.shards import local
from dlopt.schedules import Scheduler
from dlopt.training.builders.precision import Precision
from dlopt.training.clipping import Clip, Unclipped, gradient_norm
from dlopt.training.nonfinite import Diverged, NonFiniteCheck, check_weights, locate

log = logging.getLogger(__name__)

_NO_CONTEXT = nullcontext()


@dataclass(frozen=True)
class Teacher:
    """A trained model whose outputs a loss compares with those of the model that is trained (distillation).

    Attributes:
        model: frozen, in evaluation mode, on the device.
        normalize: of its inputs; None: that of the model that is trained.
        note: describes it, for the user.
    """

    model: Callable[[Tensor], Tensor]
    normalize: nn.Module | None
    note: str

    @torch.no_grad()  # not inference_mode: the loss keeps these outputs for its backward pass
    def __call__(self, batch: Batch) -> Tensor:
        """Returns the outputs of the same, augmented samples."""
        return self.model(batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs)


@dataclass(frozen=True)
class Network:
    """A model with its loss: a function of outputs, targets and, with a teacher, its outputs."""

    module: nn.Module
    model: Callable[[Tensor], Tensor]  # calls the module: wrapped by the parallel mode, compiled
    loss: Callable[..., Tensor]  # mean over the samples
    teacher: Teacher | None = None


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


@dataclass
class UpdateRecord:
    """What an update has computed, as tensors on the device.

    Attributes:
        loss: mean over the global batch, at the weights before the update; None if the update was skipped.
        micro_batches: what the metrics need of each micro-batch of this process.
        norm: of the gradient before clipping, if it was computed.
        flags: (loss, whether a gradient is not finite) of each evaluation whose check is deferred.
    """

    loss: Tensor | None
    micro_batches: list[Measured]
    norm: Tensor | None = None
    flags: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def clone(self) -> "UpdateRecord":
        flags = [(loss.clone(), flag.clone()) for loss, flag in self.flags]
        loss, norm = (None if each is None else each.clone() for each in (self.loss, self.norm))
        return UpdateRecord(loss, [each.clone() for each in self.micro_batches], norm, flags)


class EpochBatches(Protocol):
    """The training batches of this rank (`dlopt.data.batches.Batches`)."""

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[Batch]:
        """Yields the batches of one epoch from batch `start` on, which is used by update `step`."""
        ...


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
        mode: splits a batch into micro-batches and reduces their losses and gradients over processes.
        measure: keeps what the metrics need of a micro-batch.
        clip: clips the reduced gradients.
        post_hooks: called after every update that was not skipped (buffer synchronization, weight averaging).
        after_step: called after every update that has changed the weights (stopping rules).
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
        measure: Measure,
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
        self.measure = measure
        self.clip = Unclipped() if clip is None else clip
        self.post_hooks = post_hooks
        self.after_step = after_step
        self.skip = skip
        self.observers = observers
        self.scaler = precision.scaler()
        self.accumulate = settings.accumulate
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.rate = schedule.rate  # learning rate of the latest update
        self.record: UpdateRecord | None = None  # of the latest update; None until its first evaluation has ended
        self.check = NonFiniteCheck(
            self.parameters,
            immediate=settings.check_now,
            locate=self._locate,
            norm=None if mode.state.sharding == "replicated" else mode.state.norm,
        )
        has_own_zero_grad = type(optimizer).zero_grad is not Optimizer.zero_grad
        self._zero_grad = optimizer.zero_grad if has_own_zero_grad else self._drop_gradients
        self._model = precision.autocast(network.model)
        self._eager_model = precision.autocast(network.module)
        self._loss = precision.autocast(network.loss)
        self._teacher = network.teacher
        self._sampled_loss = precision.autocast(sampled_cross_entropy)
        # Seeding costs a tiny model 10 % of its step: the generator's state evicts the model from the CPU cache.
        self._generators = _generators(self.parameters) if is_stochastic(network.module) else []
        self._checks_all = optimizer_traits(optimizer).uses_all_gradients
        self._may_undo = skip is not None or settings.halve_on_out_of_memory
        buffers = network.module.buffers() if self._may_undo else ()
        self._buffers = [local(buffer) for buffer in buffers if not buffer.is_meta]  # batch-norm statistics
        self._saved_buffers = [buffer.clone() for buffer in self._buffers]
        self._scale = None if self.scaler is None or after_step is None else self.scaler.get_scale()
        self._evaluations = 0  # of the loss, in all updates of the run

    # -- the update

    def update(self, batch: Batch, number: int, *, log_norm: bool = False) -> UpdateRecord:
        """Runs update `number` (from 0) on this process's samples of a batch.

        `log_norm`: compute the norm of the gradient before clipping. Raises `Diverged`.
        """
        with self._observed(batch, number) if self.observers else _NO_CONTEXT:
            self._begin(batch, number, log_norm=log_norm)
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
                self._restore_buffers()
                self.record = UpdateRecord(None, [])
            # A skipped update counts: schedule, data and seeds depend on the update's number only.
            self.schedule.step()
            assert self.record is not None  # the optimizer has called the closure
            return self._end(self.record, self.post_hooks)

    def __call__(self) -> Tensor:
        """Computes the mean loss of the batch, returned detached, and its clipped gradients, in the parameters."""
        is_first = self.record is None
        self._evaluations += 1
        self._zero_grad()
        for observer in self.observers:
            observer.before_evaluation()
        # In every evaluation, not once per update: a line search compares losses of different weights, which must not
        # differ by their dropout masks, nor count the batch once per evaluation in the statistics of batch norm.
        self._seed()
        with _NO_CONTEXT if is_first else frozen_statistics(self.module):
            while True:
                try:
                    loss, micro_batches = self.forward_backward(self.batch)
                    break
                except torch.OutOfMemoryError:
                    if not self.settings.halve_on_out_of_memory or self.accumulate >= len(self.batch.targets):
                        raise
                # Outside the except clause, in which the exception's traceback would keep the activations alive.
                self._halve_micro_batches()
        # The order matters: clipping needs unscaled gradients, and would turn one non-finite entry into many. With a
        # scaler non-finite gradients are normal: it skips the update and reduces its scale.
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.record is None:
            self.record = UpdateRecord(loss, micro_batches)
        if is_first or self._checks_all:
            flag = self.check(loss, self.number, self.rate, gradients=self.scaler is None)
            if flag is not None:
                self.record.flags.append((loss, flag))
        for observer in self.observers:
            observer.after_evaluation()
        self.record.norm = self._clip_gradients()
        for observer in self.observers:
            observer.after_clipping()
        return loss

    def forward_backward(self, batch: Batch) -> tuple[Tensor, list[Measured]]:
        """Adds the gradients of the global batch's mean loss to the parameters.

        Returns that loss, detached and equal on all ranks, and what the metrics need of each micro-batch.
        """
        measured: list[Measured] = []
        # Only a pipeline runs its micro-batches itself, several at a time.
        staged = self.mode.run_stages(batch, lambda outputs, targets: self._measured(measured, outputs, targets))
        if staged is not None:
            losses, count = staged
            measured += [Measured.of_no_samples(losses[0])] * (count - len(measured))
            return self.mode.reduce(torch.stack(losses).sum()), measured
        losses = []
        micro_batches = self.mode.split.micro_batches(batch, self.accumulate)
        sums = _GradientSums(self.parameters) if len(micro_batches) > 2 else None  # a single addition loses nothing
        for micro_batch in micro_batches:
            if sums is not None and micro_batch.is_last:
                sums.put_back()
            with self.mode.micro_batch(micro_batch):
                outputs = self._model(micro_batch.inputs)
                if micro_batch.targets.shape[0]:
                    # Each part is weighted by its samples: parts differ in size, and a mean of means would weight the
                    # samples of small ones more.
                    loss = self._measured(measured, outputs, micro_batch.targets, *self._teacher_outputs(micro_batch))
                    if micro_batch.weight != 1.0:
                        loss = loss * micro_batch.weight
                else:  # the other ranks wait for this one in collectives; its gradients are zero
                    loss = outputs.sum() * 0.0
                    measured.append(Measured.of_no_samples(loss))
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                losses.append(loss.detach())
                # Backward has freed the activations; without this, the outputs, which are large for a text, would live
                # until those of the next micro-batch have been computed.
                del outputs, loss
            if sums is not None and not micro_batch.is_last:
                sums.take()
        return self.mode.reduce(losses[0] if len(losses) == 1 else torch.stack(losses).sum()), measured

    def loss(self) -> Tensor:
        """Returns the batch's mean loss with its autograd graph, without backward: for Hessian-vector products."""
        # Fused attention kernels have no second derivatives.
        with sdpa_kernel(SDPBackend.MATH):
            return self._differentiable(
                self.batch, lambda outputs, part: self._loss(outputs, part.targets, *self._teacher_outputs(part))
            )

    def sampled_loss(self, seed: int) -> tuple[Tensor, int]:
        """Returns the mean cross-entropy, with its graph, for classes drawn from the model's predictions on the batch,
        and the number of predictions.

        Each prediction has its own random number, so that the draw does not depend on the micro-batches.
        """
        inputs, targets = self.batch
        shape = targets.shape[:1] if targets.is_floating_point() else targets.shape  # mixed labels: [B, K]
        draw = torch.Generator(targets.device).manual_seed(seed)
        noise = torch.rand(shape, generator=draw, device=targets.device)
        drawn = Batch(inputs, noise, self.batch.total)
        return self._differentiable(
            drawn, lambda outputs, part: self._sampled_loss(outputs, part.targets)
        ), noise.numel()

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

    def _begin(self, batch: Batch, number: int, *, log_norm: bool) -> None:
        self.record = None  # the next evaluation is the first one of an update
        self.batch, self.number = batch, number
        self.rate = self.schedule.rate
        self._log_norm = log_norm
        # The forward pass changes running statistics before anyone can know that the update will be skipped. Weights
        # need no copy: they are unchanged until the check has passed.
        if self._buffers:
            torch._foreach_copy_(self._saved_buffers, self._buffers)
        if self._generators:
            self._draw_seed = stream(self.settings.seed, number)

    def _end(self, record: UpdateRecord, hooks: Sequence[Callable[[], None]]) -> UpdateRecord:
        """Hands the deferred checks over, and calls the hooks of an update that was not skipped."""
        for loss, flag in record.flags:
            self.check.defer(loss, self.number, self.rate, flag)
        if record.loss is None:
            return record
        for hook in hooks:
            hook()
        if self.after_step is not None and not self._was_skipped_by_scaler():
            self.after_step()
        return record

    def _was_skipped_by_scaler(self) -> bool:
        """Returns whether the gradient scaler has skipped this update: then it reduces its scale. Synchronizes."""
        if self.scaler is None:
            return False
        former, self._scale = self._scale, self.scaler.get_scale()
        return former is not None and self._scale < former

    @contextmanager
    def _observed(self, batch: Batch, number: int) -> Iterator[None]:
        contexts = [observer.around(self, batch.inputs, batch.targets, number) for observer in self.observers]
        with ExitStack() as stack:
            for context in contexts:
                if context is not None:
                    stack.enter_context(context)
            yield

    def _teacher_outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the further argument of the loss, if there is a teacher."""
        return () if self._teacher is None else (self._teacher(batch),)

    def _measured(self, measured: list[Measured], outputs: Tensor, targets: Tensor, *teacher: Tensor) -> Tensor:
        """Returns the mean loss of a micro-batch with its graph, and appends what the metrics need of it."""
        loss = self._loss(outputs, targets, *teacher)
        measured.append(self.measure(loss.detach(), outputs.detach(), targets))
        return loss

    def _differentiable(self, batch: Batch, loss: Callable[[Tensor, Batch], Tensor]) -> Tensor:
        """Returns the mean of `loss` over the batch with its graph, repeating the random numbers of the update."""
        if self.mode.ranks.processes > 1:
            raise UserError(
                f"parallel={self.mode.name}: {type(self.optimizer).__name__} needs Hessian-vector products, which are "
                "not averaged over ranks; use parallel=single or another optimizer"
            )
        self._evaluations += 1
        self._seed()
        with torch.enable_grad(), frozen_statistics(self.module):
            # The uncompiled model: torch.compile has no second derivatives.
            parts = self.mode.split.micro_batches(batch, self.accumulate)
            losses = [part.weight * loss(self._eager_model(part.inputs), part) for part in parts]
            return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _drop_gradients(self) -> None:
        """As torch's `Optimizer.zero_grad`, without its profiler range: 6 % of a tiny model's update."""
        for parameter in self.parameters:
            parameter.grad = None

    def _seed(self) -> None:
        """Gives all evaluations of an update the same random numbers, which depend on its number only (resuming)."""
        for generator in self._generators:
            generator.manual_seed(self._draw_seed)

    def _clip_gradients(self) -> Tensor | None:
        """Returns the norm before clipping if clipping or logging needs it."""
        norm = gradient_norm(self.parameters, self.mode.state.norm) if self._log_norm else None
        clipped = self.clip(self.parameters, self.mode.state.norm)
        return norm if clipped is None else clipped

    def _restore_buffers(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._saved_buffers)

    def _halve_micro_batches(self) -> None:
        """Undoes the failed evaluation, frees its memory, and doubles the number of micro-batches."""
        self._zero_grad()
        if self.record is None:  # further evaluations leave them unchanged
            self._restore_buffers()
        self._seed()
        if self.batch.targets.is_cuda:
            torch.cuda.empty_cache()
        self.accumulate *= 2
        size = -(-len(self.batch.targets) // self.accumulate)
        log.warning("out of memory at update %d: continuing with micro-batches of %d samples", self.number + 1, size)

    def _locate(self, loss_is_finite: bool) -> str:
        return locate(self.module, self.batch.inputs, self.mode, self.loss, loss_is_finite=loss_is_finite)


class _GradientSums:
    """Sums of the gradients of bf16 weights in fp32.

    Added up in bf16, a gradient would be lost that is below 2^-9 of the sum of those before it.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._sums: dict[Tensor, Tensor | None] = {p: None for p in parameters if p.dtype == torch.bfloat16}

    def take(self) -> None:
        """Moves the gradients from the parameters into the sums."""
        for p, total in self._sums.items():
            if p.grad is not None:
                self._sums[p] = p.grad.float() if total is None else total.add_(p.grad)
                p.grad = None

    def put_back(self) -> None:
        """Moves the sums into the parameters: before the last backward, which averages the gradients of ranks."""
        for p, total in self._sums.items():
            p.grad = None if total is None else total.to(p.dtype)
            self._sums[p] = None


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


def _generators(parameters: Sequence[Tensor]) -> list[torch.Generator]:
    """Returns the default generators of the parameters' device and of the CPU."""
    device = next((p.device for p in parameters if p.is_cuda), None)
    of_device = [] if device is None else [torch.cuda.default_generators[device.index or 0]]
    return [torch.default_generator, *of_device]
