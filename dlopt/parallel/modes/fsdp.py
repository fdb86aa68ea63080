"""Fully sharded data parallelism (PyTorch's FSDP2): as ddp, and also shards weights, gradients and optimizer state.

Each unit of the model is all-gathered before it computes and resharded afterwards.

Rajbhandari et al. 2020, "ZeRO" (stage 3); Zhao et al. 2023, "PyTorch FSDP".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Count, Natural
from dlopt.machine.world import current
from dlopt.models.known import is_container
from dlopt.optim.parameters import NORMS
from dlopt.parallel.dropout import convert_dropout
from dlopt.parallel.mode import Mode, Placed, join_mode
from dlopt.parallel.modes.ddp import DataParallel
from dlopt.parallel.modes.sync_batchnorm import buffer_averaging, synchronize
from dlopt.parallel.processes.process_group import ProcessGroup, ProcessKeys
from dlopt.parallel.shard_files import ShardWriter
from dlopt.parallel.shards import TensorShards
from dlopt.parallel.step_timing import StepTiming


class ShardingKeys(ProcessKeys):
    """Config keys of the mode."""

    shards: Count | None
    unit_parameters: Natural
    reshard_after_forward: bool
    sync_every_micro_batch: bool
    cpu_offload: bool
    sync_batchnorm: bool


def fully_sharded(*, device: torch.device, accumulate: int, precision: str, **keys: Unpack[ShardingKeys]) -> Mode:
    """Joins the process group and builds the mode. Raises `UserError` for keys that contradict each other."""
    if keys["cpu_offload"] and device.type != "cuda":
        raise UserError("parallel.cpu_offload=true: requires a GPU; set parallel.cpu_offload=false")
    if (world := current()) is not None:
        check_shards(keys["shards"], world.size)
    build = partial(FullySharded, accumulate=accumulate, low_precision=precision == "bf16", keys=keys)
    return join_mode("fsdp", device, build, keys)


def check_shards(shards: int | None, processes: int) -> None:
    """Raises `UserError` if shards of equal size need another number of processes."""
    if shards is not None and processes % shards:
        raise UserError(
            f"parallel.shards={shards}: must divide the number of processes ({processes}); null: all processes"
        )


class FullySharded(DataParallel):
    """Data parallelism whose parameters are DTensors, sharded along dimension 0."""

    def __init__(
        self, group: ProcessGroup, device: torch.device, *, accumulate: int, low_precision: bool, keys: ShardingKeys
    ) -> None:
        super().__init__(group, device, accumulate=accumulate, sync_batchnorm=keys["sync_batchnorm"], name="fsdp")
        self.sharding = TensorShards(is_by_rows=True)
        self.low_precision = low_precision
        self.keys = keys

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Placed:
        from torch.distributed.fsdp import FSDPModule

        if self.sync_batchnorm:
            synchronize(model, self.device)
        convert_dropout(model, self.dropout)
        # Sharding comes last: it replaces the parameters and hooks every unit.
        model.to(memory_format=torch.contiguous_format)  # FSDP2 requires it; layers follow the format of their inputs
        self._shard(model)
        if not self.keys["sync_every_micro_batch"]:
            self._no_sync = lambda: _no_gradient_sync(model)

        def call(inputs: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return model(inputs)
            # no_grad instead of inference mode: gathered inference tensors could not be reused in training.
            with torch.inference_mode(False), torch.no_grad():
                outputs = model(inputs)
            # Without a backward, units with reshard_after_forward=false would stay gathered: the next forward would use
            # stale weights.
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            return outputs

        return Placed(
            call,
            buffer_averaging(model, self.group.size),
            timing=StepTiming(self.group, self.device),
            writer=ShardWriter(self.group.rank, minutes=self.group.minutes),
        )

    def _shard(self, model: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        shards = self.keys["shards"] or self.group.size
        replicas = self.group.size // shards
        # With replicas: HSDP. Gradients are reduce-scattered within a shard group and averaged over the replicas.
        dims = {"shard": shards} if replicas == 1 else {"replicate": replicas, "shard": shards}
        mesh = init_device_mesh(self.device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))
        options: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self.keys["reshard_after_forward"],
            "offload_policy": CPUOffloadPolicy() if self.keys["cpu_offload"] else OffloadPolicy(),
        }
        if self.low_precision:
            # Gather weights in bf16, in which autocast uses them anyway. Norms stay in fp32, as under autocast.
            norms: list[nn.Module] = [m for m in model.modules() if isinstance(m, NORMS) and [*m.parameters()]]
            if norms:
                fully_shard(norms, **options)
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for unit in fsdp_units(model, self.keys["unit_parameters"]):
            fully_shard(unit, **options)
        fully_shard(model, **options)


def fsdp_units(model: nn.Module, min_parameters: int) -> list[nn.Module]:
    """Returns the blocks to gather one at a time: members of containers with at least `min_parameters` parameters.

    Smaller blocks, and blocks that share parameters with another block, are gathered with the root.
    """
    candidates: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if is_container(child):
                visit(child)
            elif sum(p.numel() for p in child.parameters()) >= max(min_parameters, 1):
                candidates.append(child)

    visit(model)
    uses: dict[nn.Parameter, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            uses[parameter] = uses.get(parameter, 0) + 1
    return [unit for unit in candidates if all(uses[p] == 1 for p in unit.parameters())]


@contextmanager
def _no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """FSDP2's counterpart of DDP's no_sync: accumulates full local gradients until the next backward outside."""
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
