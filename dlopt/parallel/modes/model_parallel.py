"""Base of filter, columns, spatial and hybrid: a device mesh of data parallelism x model parallelism.

The ranks of a model group hold one model together and process the same samples; groups process different samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, nn

from dlopt.parallel.collectives import ModelGroup, ShardSpec
from dlopt.parallel.dropout import convert_dropout
from dlopt.parallel.mode import GroupMode, ModeTraits, Placed
from dlopt.parallel.modes.split_layers import distribute
from dlopt.parallel.modes.sync_batchnorm import buffer_averaging, synchronize
from dlopt.parallel.processes.process_group import ProcessGroup
from dlopt.parallel.shards import TensorShards, local
from dlopt.parallel.step_timing import StepTiming

_BUCKET_BYTES = 25 * 2**20  # of gradients per all-reduce, as in DDP


@dataclass
class ShardingPlan:
    """How a model was split in place.

    `shard_specs`: by name of a sharded parameter or buffer. `dropouts`: see `convert_dropout`. `partial_grads`:
    names of replicated parameters whose gradients must be summed over the model group.
    """

    shard_specs: Mapping[str, ShardSpec]
    dropouts: Mapping[nn.Module, Callable[[Tensor], ShardSpec]]
    partial_grads: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=list)


SplitFunction = Callable[[nn.Module, tuple[int, ...], ModelGroup], ShardingPlan]


class ModelParallel(GroupMode):
    """`data_degree` model groups. Each holds one model, split in place by `split`."""

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        *,
        name: str,
        accumulate: int,
        split: SplitFunction,
        data_degree: int = 1,
        sync_batchnorm: bool = True,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        # Creates the process groups of both dimensions, which is a collective: all ranks build the mode together.
        self.mesh = init_device_mesh(
            device.type, (data_degree, group.size // data_degree), mesh_dim_names=("data", "model")
        )
        rank = self.mesh.get_local_rank("data")
        super().__init__(group, device, name, accumulate=accumulate, data_rank=rank, data_degree=data_degree)
        self.split_model = split
        self.data_degree = data_degree
        self.model_group = ModelGroup(self.mesh.get_group("model"))
        self.sharding = TensorShards()
        self.ranks.is_counted = self.model_group.rank == 0  # all ranks of a model group have the same losses
        self.sync_batchnorm = sync_batchnorm and data_degree > 1
        batch_norm_shards = 1 if sync_batchnorm else data_degree
        self.traits = ModeTraits(batch_norm_shards=batch_norm_shards)
        self._partial_grads: list[nn.Parameter] = []
        self._parameters: list[nn.Parameter] = []

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Placed:
        plan = self.split_model(model, input_shape, self.model_group)
        if self.sync_batchnorm:
            synchronize(model, self.device, self.mesh.get_group("data"))
        convert_dropout(model, self.dropout, plan.dropouts)
        self.distribute_parameters(model, plan)
        named = dict(model.named_parameters())
        self._parameters, self._partial_grads = list(named.values()), [named[name] for name in plan.partial_grads]
        synchronize_buffers = buffer_averaging(model, self.data_degree, self.mesh.get_group("data"))
        notes = (self._placement_note(named), *plan.notes)
        return Placed(model, synchronize_buffers, notes, StepTiming(self.group, self.device))

    def distribute_parameters(self, model: nn.Module, plan: ShardingPlan) -> None:
        """Turns the parameters into DTensors, which the optimizer and the checkpoint see."""
        distribute(model, self.mesh["model"], plan.shard_specs)

    def _placement_note(self, named: Mapping[str, nn.Parameter]) -> str:
        total = sum(p.numel() for p in named.values())
        held = sum(local(p).numel() for p in named.values() if not p.is_meta)
        replicated = sum(p.numel() for p in named.values() if not p.is_meta and local(p).numel() == p.numel())
        line = f"parallel={self.name}: {total} parameters over {self.model_group.size} processes; {held} on this one"
        if self.sharding.kind == "tensors":
            line += f" ({replicated} replicated)"
        return line + (f"; {self.data_degree} data-parallel groups" if self.data_degree > 1 else "")

    def finish_backward(self, loss: Tensor) -> Tensor:
        # Within the model group first: the sum over groups below then adds complete gradients, on every rank.
        partial = [local(p.grad) for p in self._partial_grads if p.grad is not None]
        all_reduce_buckets(partial, self.model_group.process_group)
        if self.data_degree > 1:
            gradients = [local(p.grad) for p in self._parameters if p.grad is not None]
            all_reduce_buckets(gradients, self.mesh.get_group("data"))
        return self.ranks.sum_loss(loss)


@torch.no_grad()
def all_reduce_buckets(tensors: Sequence[Tensor], group: distributed.ProcessGroup | None) -> None:
    """Replaces tensors by their sums over the group, in buckets: few large messages are faster than many small ones."""
    bucket: list[Tensor] = []
    for number, tensor in enumerate(tensors, 1):
        bucket.append(tensor)
        if number == len(tensors) or sum(t.numel() * t.element_size() for t in bucket) >= _BUCKET_BYTES:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            distributed.all_reduce(flat, group=group)
            for target, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                target.copy_(values.view(target.shape))
            bucket = []
