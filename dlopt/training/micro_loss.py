"""The loss of a micro-batch: of outputs and targets, or of a task of the user's own."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlopt.basics.random import stream
from dlopt.data.batches import Batch
from dlopt.metrics.sums import Kept, MetricSum
from dlopt.tasks.draws import Draws
from dlopt.tasks.user import Batch as TaskBatch
from dlopt.tasks.user import TaskErrors, TaskLoss
from dlopt.training.builders.precision import Precision

Forward = Callable[..., tuple[Tensor, Kept]]
"""(inputs, targets, **further arguments of the loss) of a micro-batch -> mean loss with its graph, for the metrics."""
TaskLossCall = Callable[[TaskBatch, Draws], Mapping[str, Tensor]]
"""See `dlopt.tasks.user.TaskLoss`."""

_TASK = 1  # counter of the draws of a task of the user's own, beside those of the model's layers


@dataclass(frozen=True)
class Network:
    """The part of a `Workload` that an update calls, and that observers may wrap.

    Attributes:
        model: calls the module: wrapped by the parallel mode, compiled.
        loss: (outputs, targets, **additional arguments) -> mean over the samples.
        further: returns the additional arguments of the loss for a micro-batch; None if there are none.
        compile: compiles model, loss and metrics as one region; None to call `model` and `loss` separately.
        task_loss: of a task of the user's own, in the place of `model` and `loss`: (batch, draws) -> the parts of the
            loss by name; `loss` is then the same without the parallel mode's wrapper, not compiled.
        advice: a setting that `task_loss` may not support, and what to use instead.
    """

    module: nn.Module
    model: Callable[[Tensor], Tensor]
    loss: Callable[..., Tensor]
    further: Callable[[Batch], Mapping[str, Tensor]] | None = None
    compile: Callable[[Forward], Forward] | None = None
    task_loss: TaskLossCall | None = None
    advice: tuple[str, str] | None = None


@dataclass(frozen=True)
class CurrentUpdate:
    """What all evaluations of the loss in an update share."""

    batch: Batch
    number: int  # from 0
    log_norm: bool
    seed: int  # of the random numbers of all updates of the run

    @property
    def layer_seed(self) -> int:
        return stream(self.seed, self.number)

    @property
    def task_seed(self) -> int:
        return stream(self.seed, self.number, _TASK)


class MicroLoss:
    """The loss of outputs and targets."""

    name: str = "the loss"  # for messages
    errors: AbstractContextManager[None] = nullcontext()  # around the loss and its backward pass

    def __init__(self, network: Network, precision: Precision, metrics: MetricSum) -> None:
        self.metrics = metrics
        self.eager_model = precision.autocast(network.module)  # has second derivatives, and its hooks run
        self._model = model = precision.autocast(network.model)
        self._loss = loss = precision.autocast(network.loss)
        self._further = network.further

        # A compiler sees the three as a whole. Compiled separately, the loss would read and write the outputs once per
        # operation. With text, whose outputs are larger than all activations, that takes as long as the model.
        def forward(inputs: Tensor, targets: Tensor, **further: Tensor) -> tuple[Tensor, Kept]:
            outputs = model(inputs)
            value = loss(outputs, targets, **further)
            return value, metrics.keep(value.detach(), outputs.detach(), targets)

        self._forward: Forward = forward if network.compile is None else network.compile(forward)
        # Batch norm would count the placeholder of no samples. Other models may fail on an empty batch.
        normalizes = any(isinstance(each, _BatchNorm) for each in network.module.modules())
        self._placeholder = slice(0, 0 if normalizes else 1)

    def weighted(self, part: Batch, update: CurrentUpdate) -> tuple[Tensor, Kept]:
        """Returns the weighted loss of a micro-batch with its graph, and what the metrics need of it.

        Micro-batches differ in size: each loss is weighted by its number of samples, because a mean of means would
        weight the samples of small micro-batches more. Without samples the weight is 0, and so are the gradients, for
        which the other ranks wait in collectives.
        """
        loss, kept = self._mean(part, update)
        return (loss if part.weight == 1.0 else loss * part.weight), kept

    def _mean(self, part: Batch, update: CurrentUpdate) -> tuple[Tensor, Kept]:
        """Returns the mean loss, and what the metrics need."""
        if not part.weight:
            loss = self._model(part.inputs[self._placeholder]).sum()
            return loss, Kept.of_no_samples(loss)
        return self._forward(part.inputs, part.targets, **self._arguments(part))

    def eager(self, part: Batch, update: CurrentUpdate) -> Tensor:
        """Returns the mean loss of a micro-batch with its graph, of the uncompiled model."""
        loss: Tensor = self._loss(self.eager_model(part.inputs), part.targets, **self._arguments(part))
        return loss

    def of_outputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Kept]:
        """Returns the mean loss of a micro-batch whose outputs a pipeline has computed."""
        loss = self._loss(outputs, targets)
        return loss, self.metrics.keep(loss.detach(), outputs.detach(), targets)

    def _arguments(self, part: Batch) -> Mapping[str, Tensor]:
        return {} if self._further is None else self._further(part)


class TaskMicroLoss(MicroLoss):
    """The loss of a task of the user's own."""

    def __init__(self, network: Network, precision: Precision, metrics: MetricSum, device: torch.device) -> None:
        assert network.task_loss is not None and isinstance(network.loss, TaskLoss)
        self.metrics = metrics
        self._task = network.loss.task
        self.name = f"the loss of task={self._task.path}"
        self.errors = TaskErrors(self._task, "the loss", network.advice)
        self.eager_model = precision.autocast(network.module)
        self._task_loss = precision.autocast_parts(network.task_loss)
        self._eager_task_loss = precision.autocast_parts(network.loss)
        self._device = device
        self._dtype = precision.dtype

    def _mean(self, part: Batch, update: CurrentUpdate) -> tuple[Tensor, Kept]:
        return self._evaluated(self._task_loss, part, update)

    def eager(self, part: Batch, update: CurrentUpdate) -> Tensor:
        with self.errors:
            return self._evaluated(self._eager_task_loss, part, update)[0]

    def _evaluated(self, task_loss: TaskLossCall, part: Batch, update: CurrentUpdate) -> tuple[Tensor, Kept]:
        draws = Draws.of_update(self._device, update.task_seed, update.batch.total, self._dtype, part.positions)
        parts = task_loss(self._task.batch(part.inputs, part.targets, self._dtype), draws)
        loss = torch.stack([*parts.values()]).sum()
        named = {name: value.detach() for name, value in parts.items() if name}
        return loss, self.metrics.keep_parts(loss.detach(), named, len(part.targets) if part.weight else 0)
