"""The interface of a parallel mode: everything that training needs to know about the processes of a run.

`Mode` is one process on one device, and the base of every other mode. To write a mode, subclass `GroupMode`
(`process_group.py`: collectives and the synchronized stop flag), override what differs, and name the function that
builds it in a YAML file under `conf/parallel/`; `ddp.py` is the example to read.

How a mode shards the model (`Mode.sharding`):
    replicated  every process holds the full model (single, ddp)
    tensors     parameters are DTensors of which each process holds a shard (fsdp, filter, spatial, hybrid)
    layers      each process holds some layers; the others are on the meta device (pipeline, columns)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dlopt.parallel.shard_files import ShardWriter
    from dlopt.parallel.step_timing import StepTiming

T = TypeVar("T")

BatchShard = Callable[[int], slice | Tensor]
"""Maps the size of a global batch to the positions of this rank's samples."""


class MetricRecord(Protocol):
    """Accumulates the metrics of a step's first evaluation (`dlopt.training.metrics.MetricSum`)."""

    def add(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None: ...

    def add_empty(self, device: torch.device) -> None:
        """Records a micro-batch without samples on this rank: all ranks record equally many micro-batches."""
        ...


class MicroSteps(Protocol):
    """The part of a training step that a mode drives (`dlopt.training.step.Step`)."""

    accumulate: int
    optimizer: torch.optim.Optimizer

    def micro_batch(self, inputs: Tensor, targets: Tensor, weight: float, record: MetricRecord | None) -> Tensor:
        """Runs forward and backward; returns the mean loss times `weight`, detached."""
        ...

    def empty_micro_batch(self, inputs: Tensor, record: MetricRecord | None) -> Tensor:
        """Takes part in the collectives of a micro-batch without samples on this rank. Contributes zero gradients."""
        ...

    def micro_loss(self, outputs: Tensor, targets: Tensor, record: MetricRecord | None) -> Tensor:
        """Returns the mean loss of a micro-batch with its graph."""
        ...

    def differentiable_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Runs forward; returns the mean loss with its graph. Nothing is recorded."""
        ...


class EpochBatches(Protocol):
    """The training batches of this rank (`dlopt.data.batches.Batches`)."""

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (inputs, targets) of one epoch from batch `start` on, which is used by update `step`."""
        ...


class Mode:
    """One process on one device."""

    name: str
    device: torch.device
    rank = 0
    processes = 1
    local_processes = 1  # on this machine; they share its cores
    is_main = True  # writes files and prints
    sharding: Literal["replicated", "tensors", "layers"] = "replicated"
    compiles = True  # the model can be compiled as a whole
    supports_loss_aware_samplers = True  # every rank computes the losses of its own samples
    batch_norm_shards = 1  # shards of a batch that batch norm normalizes separately
    micro_batches_in_flight = 1  # micro-batches into which the mode itself splits a batch
    notes: tuple[str, ...] = ()  # messages for the user about the placement of the model

    def __init__(self, device: torch.device, name: str = "single") -> None:
        self.device = device
        self.name = name

    # -- sharding a batch

    @property
    def batch_shard(self) -> BatchShard | None:
        """This rank's samples of a training batch; None: all of them."""
        return None

    @property
    def evaluation_shard(self) -> BatchShard | None:
        """This rank's samples of an evaluation batch; None: all of them."""
        return None

    def shard_augmentation(self, augment: Any) -> Any:
        """Returns the augmentation of this rank's samples, with the random draws of the global batch."""
        return augment

    def track_batches(self, batches: EpochBatches) -> EpochBatches:
        """Wraps the training batches so that the mode knows the size of each global batch."""
        return batches

    # -- placing the model

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        """Places `model` on the processes, for samples of `input_shape`, and returns the function that calls it.

        May replace layers within `model` by distributed ones; parameters and buffers keep their names. Parameters may
        become DTensors (all of them: optimizers do not mix them with plain tensors), or move to the meta device where
        another rank holds them. All ranks call this together. Raises `UserError` for a model that cannot be placed.
        """
        return model

    def buffer_synchronization(self, model: nn.Module) -> Callable[[], None] | None:
        """Returns the hook that synchronizes buffers across ranks after each update; None: none is needed."""
        return None

    # -- one update

    def forward_backward(
        self, step: MicroSteps, inputs: Tensor, targets: Tensor, record: MetricRecord | None
    ) -> Tensor:
        """Runs forward and backward of a batch, micro-batch by micro-batch.

        Leaves the gradients of the global batch's mean loss in the parameters and returns that loss, detached and
        equal on all ranks: optimizers that evaluate many times branch on it.
        """
        if step.accumulate == 1:
            return step.micro_batch(inputs, targets, 1.0, record)
        micro_batches = _micro_batches(inputs, targets, step.accumulate)
        return torch.stack([step.micro_batch(*batch, record) for batch in micro_batches]).sum()

    def differentiable_loss(self, step: MicroSteps, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the batch's mean loss with its graph, for Hessian-vector products.

        Raises `UserError` in distributed modes, which do not average second derivatives.
        """
        if step.accumulate == 1:
            return step.differentiable_loss(inputs, targets)
        micro_batches = _micro_batches(inputs, targets, step.accumulate)
        return torch.stack([weight * step.differentiable_loss(x, y) for x, y, weight in micro_batches]).sum()

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the 2-norm of all parameters, or of their gradients, as one vector: a scalar, equal on all ranks.

        A rank may hold shards of the tensors, or only some of them; replicas count once.
        """
        return torch.nn.utils.get_total_norm(tensors)

    # -- reducing, broadcasting

    def sum_over_ranks(self, values: Sequence[float]) -> Sequence[float]:
        """Returns the elementwise sums over ranks. Values that the ranks of a model group share count once."""
        return values

    def maximum_over_ranks(self, values: Tensor) -> Tensor:
        """Returns the elementwise maximum over ranks of a tensor on the host."""
        return values

    def gather_lists(self, values: list[T]) -> list[T]:
        """Returns the concatenated lists of all ranks."""
        return values

    def broadcast(self, value: T) -> T:
        """Returns rank 0's value on all ranks."""
        return value

    # -- stopping

    def synchronized_stop(self, stop: T) -> T:
        """Returns a stop flag that becomes true on all ranks after the same update."""
        return stop

    def evaluation_stop(self, stop: T) -> T:
        """Returns the flag for use within an evaluation. All ranks must read it equally often."""
        return stop

    # -- state

    def full_state(self, state: T) -> T:
        """Returns the state of a model or an optimizer with full tensors, as in a single process.

        All ranks call this together; only the main rank needs the result.
        """
        return state

    def load_model(self, model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Loads a full state, which all ranks pass; each rank keeps its shards."""
        model.load_state_dict(state, strict=strict)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Loads the full state of an optimizer, as `load_model` does."""
        optimizer.load_state_dict(dict(state))

    def checkpoint_writer(self) -> "ShardWriter | None":
        """Returns the writer with which every rank saves its shards; None: the main rank saves everything."""
        return None

    # -- timing

    def step_timing(self) -> "StepTiming | None":
        """Returns the step timing of all ranks; None: there is only one."""
        return None


def _micro_batches(inputs: Tensor, targets: Tensor, accumulate: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yields (inputs, targets, fraction of the batch's samples) of each micro-batch."""
    count = len(targets)
    number = min(accumulate, count)
    for x, y in zip(inputs.tensor_split(number), targets.tensor_split(number), strict=True):
        yield x, y, len(y) / count
