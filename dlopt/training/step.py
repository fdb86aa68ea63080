"""One update, from a batch to new weights: `Step.update` calls `loss_and_gradients`, which calls `forward_backward`.

Optimizers that evaluate the loss several times per update call `loss_and_gradients` themselves (`closure.py`). Small
models on a GPU replay their updates from a CUDA graph (`graphed_update.py`). What only some runs need around a whole
update is in `around.py`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batch
from dlopt.metrics.sums import Kept, MetricSum
from dlopt.models.known import is_stochastic
from dlopt.models.layers import frozen_statistics
from dlopt.optim.traits import refuse_missing_closure
from dlopt.parallel.mode import Mode
from dlopt.schedules import Scheduler
from dlopt.training.builders.precision import Precision
from dlopt.training.clipping import ByNorm, Clip, Unclipped, gradient_norm
from dlopt.training.micro_loss import CurrentUpdate, MicroLoss, Network, TaskMicroLoss
from dlopt.training.nonfinite import NonFiniteCheck, locate
from dlopt.training.saved_buffers import SavedBuffers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepSettings:
    """Settings of a step; see `train.yaml`."""

    accumulate: int = 1  # micro-batches per batch of data.batch_size
    seed: int = 0  # of the model's random numbers (dropout)
    check_now: bool = True  # for non-finite values, before each update
    halve_on_out_of_memory: bool = False
    grows: bool = False  # later updates have more micro-batches


@dataclass
class UpdateResult:
    """What an update has computed, as tensors on the device."""

    loss: Tensor | None  # mean over the global batch, at the weights before the update; None: it was skipped
    micro_batches: list[Kept]  # of this process, for the metrics
    norm: Tensor | None = None  # of the gradient before clipping, if it was computed
    flags: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of deferred checks: (loss, `examine`'s flag)

    def clone(self) -> "UpdateResult":
        flags = [(loss.clone(), flag.clone()) for loss, flag in self.flags]
        loss, norm = (None if each is None else each.clone() for each in (self.loss, self.norm))
        return UpdateResult(loss, [each.clone() for each in self.micro_batches], norm, flags)


class UpdateFunction(Protocol):
    """`Step.update`, or its replay from a CUDA graph, with what the run needs around it."""

    def __call__(self, batch: Batch, number: int, *, log_norm: bool = False) -> UpdateResult: ...


class EpochBatches(Protocol):
    """The training batches of this rank: see `dlopt.data.batches.Batches`."""

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[Batch]: ...


class Observer:
    """Base of diagnostics and profiler: observes updates and must not change their results."""

    def instrument(self, network: Network, batches: EpochBatches) -> tuple[Network, EpochBatches]:
        """Returns both, possibly wrapped; called once, before the first update."""
        return network, batches

    def around_update(
        self, step: "Step", inputs: Tensor, targets: Tensor, number: int
    ) -> AbstractContextManager[None] | None:
        """Returns a context for update `number` (from 0) on this batch; None to skip this update."""
        return None

    def around_forward_backward(self) -> AbstractContextManager[None]:
        return nullcontext()

    def before_clip(self) -> None:
        """Called in every evaluation, when the gradients are reduced and unscaled."""

    def after_clip(self, step: "Step") -> None:
        """Called before the optimizer may overwrite the gradients."""


@dataclass(eq=False, repr=False)
class Step:
    """Runs the updates of an optimizer that evaluates the loss once per update; for others see `ClosureStep`."""

    network: Network
    optimizer: Optimizer
    schedule: Scheduler
    mode: Mode
    settings: StepSettings
    _: KW_ONLY
    precision: Precision
    metrics: MetricSum  # of the training samples, to which every update adds
    clip: Clip = field(default_factory=Unclipped)
    synchronize_buffers: Callable[[], None] | None = None  # makes the buffers equal on all ranks, after every update
    average: Callable[[], None] | None = None  # updates the average of the weights, after every update
    observers: Sequence[Observer] = ()
    passes: int | None = field(default=1, init=False)  # forward and backward, of the latest update; None: it had others

    def __post_init__(self) -> None:
        network, mode = self.network, self.mode
        self.module = network.module
        # The clip that needs the norm of all gradients; a class of the user's own derived from it may need others.
        self._by_norm = self.clip if type(self.clip) is ByNorm else None
        self.seeds = True  # whether evaluations seed the random numbers of the model's layers
        self.scaler = self.precision.scaler()
        self.accumulate = self.settings.accumulate
        self.parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.rate = self.schedule.rate  # of the latest update
        self.check = NonFiniteCheck(
            self.parameters if self.scaler is None else [],  # non-finite gradients are normal with a scaler
            immediate=self.settings.check_now,
            locate=self._locate,
            sharding=mode.sharding,
            clips_by_norm=self._by_norm is not None,
        )
        self.micro_loss = MicroLoss(network, self.precision, self.metrics)
        if network.task_loss is not None:
            self.micro_loss = TaskMicroLoss(network, self.precision, self.metrics, mode.device)
        # Seeding costs a tiny model 10 % of its step: the generator's state evicts the model from the CPU cache.
        self._generators = [torch.default_generator] if is_stochastic(network.module) else []
        if self._generators and mode.device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[mode.device.index or 0])

    # -- the update

    def update(self, batch: Batch, number: int, *, log_norm: bool = False) -> UpdateResult:
        """Runs update `number` (from 0) on this process's samples of a batch.

        `log_norm`: compute the norm of the gradient before clipping. Raises `Diverged`.
        """
        # 1. Begin.
        self.begin(batch, number, log_norm=log_norm)

        # 2. Compute the loss and its clipped gradients. Raises `Diverged` with the weights intact.
        result = self.loss_and_gradients()

        # 3. Change the weights.
        try:
            if self.scaler is None or not self._has_gradients():
                self.optimizer.step()
            else:
                # Skips an overflow, upon which `update` reduces the scale. Waits for the device, except with a fused
                # optimizer, whose kernel skips it itself.
                self.scaler.step(self.optimizer)
                self.scaler.update()
        except Exception as error:
            refuse_missing_closure(self.optimizer, error)
            raise

        # 4. Advance the learning rate, and end.
        self.advance()
        self.end(result, self.average)
        return result

    def begin(self, batch: Batch, number: int, *, log_norm: bool) -> None:
        """Keeps what all evaluations of the loss in an update share."""
        self.rate = self.schedule.rate
        self.current = CurrentUpdate(batch, number, log_norm, self.settings.seed)

    def loss_and_gradients(self, *, checks: bool = True) -> UpdateResult:
        """Computes the mean loss of the batch, and its clipped gradients in the parameters.

        `checks`: raise `Diverged`, now or later, if the loss or a gradient is not finite.
        """
        # 1. Start from no gradients, and from the random numbers of this update.
        self.zero_grad()
        self.seed()

        # 2. Forward and backward.
        with self._observing() if self.observers else nullcontext():
            if self.settings.halve_on_out_of_memory:
                loss, micro_batches = self.halving_forward_backward(self.current.batch)
            else:
                loss, micro_batches = self.forward_backward(self.current.batch)

        # 3. Unscale before clipping, whose thresholds are for unscaled gradients.
        if self.scaler is not None and self._has_gradients():
            self.scaler.unscale_(self.optimizer)

        # 4. The norm before clipping, once: the log, the check and the clipping would each read all gradients.
        is_needed = self.current.log_norm or self._by_norm is not None or (checks and self.check.needs_norm)
        norm = self.gradient_norm() if is_needed else None

        # 5. Check before clipping, which would turn one non-finite entry into many.
        flag = self.check.examine(loss, self.current.number, self.rate, norm) if checks else None

        # 6. Clip. A clipping of the user's own may also compute the norm.
        for observer in self.observers:
            observer.before_clip()
        if self._by_norm is not None and norm is not None:
            self._by_norm.scale(self.parameters, norm)
        elif (clipped := self.clip(self.parameters, self.mode.sharding.norm)) is not None:
            norm = clipped
        for observer in self.observers:
            observer.after_clip(self)
        return UpdateResult(loss, micro_batches, norm, [] if flag is None else [(loss, flag)])

    def end(self, result: UpdateResult, average: Callable[[], None] | None) -> None:
        """Adds the metrics, queues the deferred checks, synchronizes the buffers, and averages weights and buffers."""
        self.metrics.add(*result.micro_batches)
        for loss, flag in result.flags:
            self.check.defer(loss, self.current.number, self.rate, flag)
        if self.synchronize_buffers is not None:
            self.synchronize_buffers()
        if average is not None:
            average()

    def advance(self) -> None:
        """Advances the schedule by the update's batches of data.batch_size."""
        self.schedule.step(self.schedule.last_epoch + self.current.batch.count)

    def forward_backward(self, batch: Batch) -> tuple[Tensor, list[Kept]]:
        """Adds the gradients of the global batch's mean loss to the parameters.

        Returns that loss, detached and equal on all ranks, and the input of the metrics for each micro-batch.
        """
        parts: list[Kept] = []

        def staged_loss(outputs: Tensor, targets: Tensor) -> Tensor:
            loss, kept = self.micro_loss.of_outputs(outputs, targets)
            parts.append(kept)
            return loss

        # 1. A pipeline schedules its micro-batches itself, several at a time.
        if (staged := self.mode.run_stages(batch, staged_loss)) is not None:
            losses, count = staged
            parts += [Kept.of_no_samples(losses[0])] * (count - len(parts))
            return self.mode.finish_backward(torch.stack(losses).sum()), parts

        # 2. All others run one after the other, and add up their gradients.
        losses = []
        micro_batches = self.mode.split.micro_batches(batch, self.accumulate)
        # bf16 would lose every gradient below 2^-9 of the sum so far. A single addition loses nothing.
        low = [p for p in self.parameters if p.dtype == torch.bfloat16] if len(micro_batches) > 2 else []
        sums: dict[Tensor, Tensor] = {}  # of the gradients of bf16 weights, in fp32
        for micro_batch in micro_batches:
            if micro_batch.is_last:  # its backward averages the gradients of ranks
                for p, total in sums.items():
                    p.grad = total.to(p.dtype)
            with self.micro_loss.errors, self.mode.micro_batch(micro_batch):
                # 3. Forward.
                loss, kept = self.micro_loss.weighted(micro_batch, self.current)
                parts.append(kept)
                # 4. Backward. It frees the activations and, with them, the outputs, which are large for text: nothing
                #    here may refer to them.
                if loss.requires_grad:
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                elif not self.schedule.resting:  # otherwise the schedule has frozen every parameter of the loss
                    raise UserError(
                        "optimizer.groups: the loss does not depend on any parameter that trains; freeze fewer"
                    )
                losses.append(loss.detach())
            if not micro_batch.is_last:
                for p in low:
                    if p.grad is not None:
                        sums[p] = sums[p].add_(p.grad) if p in sums else p.grad.float()
                        p.grad = None

        # 5. Average over the ranks: a collective, because all ranks branch on the same loss and gradients.
        return self.mode.finish_backward(losses[0] if len(losses) == 1 else torch.stack(losses).sum()), parts

    def halving_forward_backward(self, batch: Batch) -> tuple[Tensor, list[Kept]]:
        """Repeats `forward_backward` with twice as many micro-batches while the device runs out of memory."""
        buffers = SavedBuffers(self.module)
        while True:
            try:
                return self.forward_backward(batch)
            except torch.OutOfMemoryError:
                largest = max(batch.joined, default=len(batch.targets))
                if self.accumulate >= largest:
                    raise
            # Outside the except clause, in which the exception's traceback would keep the activations alive.
            self.zero_grad()
            buffers.restore()
            self.seed()
            if batch.targets.is_cuda:
                torch.cuda.empty_cache()
            self.accumulate *= 2
            update, size = self.current.number + 1, -(-largest // self.accumulate)
            log.warning("out of memory at update %d: continuing with micro-batches of %d samples", update, size)

    # -- checks and state

    def check_updates(self) -> None:
        """See `NonFiniteCheck.flush`."""
        self.check.flush(self.scaler)

    def check_weights(self) -> None:
        """Also checks the weights, which a finite gradient may have made non-finite."""
        self.check_updates()
        self.check.check_weights(self.module, float(self.rate))

    def cost(self) -> dict[str, int]:
        """Returns the number of loss evaluations so far, of a `ClosureStep`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"lr": float(self.rate), "scaler": scaler, "accumulate": self.accumulate, **self.cost()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rate = state["lr"]
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.settings.halve_on_out_of_memory:
            self.accumulate = max(self.accumulate, state["accumulate"])  # do not run out of memory again

    # -- parts of an evaluation

    @contextmanager
    def _observing(self) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(observer.around_forward_backward())
            yield

    def zero_grad(self) -> None:
        """Drops all gradients."""
        if type(self.optimizer).zero_grad is not Optimizer.zero_grad:
            self.optimizer.zero_grad()
            return
        for parameter in self.parameters:  # torch's `Optimizer.zero_grad` takes 6 % of a tiny model's update
            parameter.grad = None

    def seed(self) -> None:
        """Gives all evaluations of an update the same random numbers, which depend on its number only (resuming)."""
        if self.seeds and self._generators:
            seed = self.current.layer_seed
            for generator in self._generators:
                generator.manual_seed(seed)

    def gradient_norm(self) -> Tensor:
        """Returns the 2-norm of all gradients as one vector, over all processes that have shards of them."""
        return gradient_norm(self.parameters, self.mode.sharding.norm)

    def _has_gradients(self) -> bool:
        """Returns whether anything trains: the schedule may have frozen all parameters. The scaler fails on none."""
        return any(p.grad is not None for p in self.parameters)

    def _locate(self, loss_is_finite: bool) -> str:
        batch = self.current.batch

        def repeat_forward() -> None:
            """Uncompiled: hooks do not run in a compiled model."""
            self.seed()
            with torch.enable_grad(), frozen_statistics(self.module):
                for micro_batch in self.mode.split.micro_batches(batch, self.accumulate):
                    self.micro_loss.eager(micro_batch, self.current)

        # On several ranks, the loss of some modes communicates around the model; a task calls the model itself.
        is_alone = self.mode.ranks.processes == 1 or isinstance(self.micro_loss, TaskMicroLoss)
        forward = repeat_forward if is_alone else partial(self.module, batch.inputs)
        return locate(self.module, batch.inputs, self.mode, forward, self.micro_loss.name, loss_is_finite)
