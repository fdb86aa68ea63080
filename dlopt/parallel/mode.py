"""A parallel mode: how a run uses its processes. `Mode` is one process on one device, and the base of every other mode.

A mode has three parts, each of which can be read alone:

    ranks     collectives: sum, maximum, gather, broadcast, the stop flag (`ranks.py`)
    sharding  norms and states of a model, by how it is sharded (`shards.py`)
    split     this process's samples of a batch, micro-batch by micro-batch (`batch_shards.py`)

To write a mode, subclass `GroupMode`, override what differs (`place`, `micro_batch`, `finish_backward`), and name the
function that builds it in a YAML file under `conf/parallel/`, as `ddp.py` does. Training relies on two promises:

    after `finish_backward`  the loss is equal on all ranks, to the last bit, and so is the gradient of a tensor on all
                             ranks that hold it, or the same shard of it
    after an update          so are these tensors, and the buffers (`Placed.synchronize_buffers`)

Ranks that clip, stop, skip an update or search along a line by other numbers wait for each other forever. A checkpoint
has one rank's values of a tensor, and no state of the mode. `check=step` compares the ranks (`replicas.py`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.data.batches import Batch
from dlopt.parallel.batch_shards import BatchSplit
from dlopt.parallel.dropout import CurrentShard, convert_dropout
from dlopt.parallel.processes.process_group import ProcessGroup, ProcessKeys, join
from dlopt.parallel.ranks import GroupRanks, Ranks
from dlopt.parallel.shard_files import ShardWriter
from dlopt.parallel.shards import Sharding
from dlopt.parallel.step_timing import StepTiming

MicroLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) of a micro-batch -> its mean loss."""

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class ModeTraits:
    """What training has to know about a mode before the model is placed.

    Attributes:
        batch_norm_shards: shards of a batch that batch norm normalizes separately.
        micro_batches: number of micro-batches into which the mode itself splits a batch.
    """

    batch_norm_shards: int = 1
    micro_batches: int = 1


@dataclass(frozen=True)
class Placed:
    """A model on the processes of a run.

    Attributes:
        model: calls it.
        synchronize_buffers: called after every update; makes the buffers equal on all ranks. None: they are.
        notes: lines for the user about the placement.
        timing: of the updates of all ranks; None if there is one rank.
        writer: saves the shards of every rank; None if the main rank saves everything.
    """

    model: Callable[[Tensor], Tensor]
    synchronize_buffers: Callable[[], None] | None = None
    notes: tuple[str, ...] = ()
    timing: StepTiming | None = None
    writer: ShardWriter | None = None


class Mode:
    """One process on one device."""

    def __init__(self, device: torch.device, name: str = "single") -> None:
        self.device = device
        self.name = name
        self.ranks = Ranks()
        self.sharding: Sharding = Sharding()
        self.split = BatchSplit()
        self.traits = ModeTraits()

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Placed:
        """Places `model` on the processes, for samples of `input_shape`. All ranks call this together.

        May replace layers within `model`; parameters and buffers keep their names. Parameters may become DTensors (all
        of them: optimizers do not mix them with plain tensors), or move to the meta device where another rank holds
        them. Raises `UserError` for a model that cannot be placed.
        """
        convert_dropout(model, CurrentShard())
        return Placed(model)

    def around(self, placed: Placed, loss: nn.Module) -> Callable[..., Any]:
        """Returns `loss`, of a task of the user's own, which calls the placed model any number of times."""
        return loss

    def micro_batch(self, micro_batch: Batch) -> AbstractContextManager[Any]:
        """Returns the context of the forward and backward of a micro-batch."""
        return _NO_CONTEXT

    def run_stages(self, batch: Batch, loss: MicroLoss) -> tuple[list[Tensor], int] | None:
        """Runs forward and backward of a batch whose micro-batches are in several processes at a time (pipeline).

        Returns the weighted losses of the micro-batches that ended on this rank, and the number of all; None if the
        step runs them one after the other.
        """
        return None

    def finish_backward(self, loss: Tensor) -> Tensor:
        """Makes the gradients those of the global batch's mean loss, in place; returns that loss, detached.

        Under ddp and fsdp, backward has averaged the gradients, and in a pipeline they are complete: only the loss is
        reduced. The other modes sum both. `loss`: the sum of this rank's weighted losses.
        """
        return loss


class GroupMode(Mode):
    """Base of all distributed modes: this process is one rank of a process group.

    Batches are split over `data_degree` ranks (by default all); this rank is number `data_rank`.
    """

    ranks: GroupRanks

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        name: str,
        *,
        accumulate: int = 1,
        data_rank: int | None = None,
        data_degree: int | None = None,
    ) -> None:
        super().__init__(device, name)
        self.group = group
        self.ranks = GroupRanks(group)
        rank, degree = group.rank if data_rank is None else data_rank, data_degree or group.size
        self.split = BatchSplit(accumulate, rank, degree)
        self.dropout = CurrentShard()

    def micro_batch(self, micro_batch: Batch) -> AbstractContextManager[Any]:
        return self.dropout.of(micro_batch)


def join_mode(
    name: str, device: torch.device, build: Callable[[ProcessGroup, torch.device], Mode], keys: ProcessKeys
) -> Mode:
    """Joins the process group (see `join`) and builds its mode; in a single process, returns `Mode`."""
    joined = join(name, device, **keys)
    return Mode(device, name) if joined is None else build(*joined)
