"""Fully sharded data parallelism (PyTorch's FSDP2): batches are shared as in ddp, and so are weights, gradients and the
optimizer's state. A unit of the model is put together where it computes, and cut again afterwards.

Rajbhandari et al. 2020, "ZeRO" (stage 3); Zhao et al. 2023, "PyTorch FSDP".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dlopt.errors import UserError
from dlopt.parallel.ddp import DataParallel
from dlopt.parallel.dropout import make_global
from dlopt.parallel.mode import Mode
from dlopt.parallel.process_group import Group, ProcessKeys, join
from dlopt.parallel.rendezvous import current
from dlopt.parallel.shard_files import ShardWriter
from dlopt.parallel.sync_batchnorm import synchronize
from dlopt.ranges import Count, Natural

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def fully_sharded(
    *,
    device: torch.device,
    accumulate: int,
    precision: str,
    shards: Count | None,
    unit_parameters: Natural,
    reshard_after_forward: bool,
    sync_every_micro_batch: bool,
    cpu_offload: bool,
    sync_batchnorm: bool,
    **keys: Unpack[ProcessKeys],
) -> Mode:
    """Builds the mode of this process, which joins its group. Raises `UserError` where the keys do not fit together."""
    if precision == "fp16":
        raise UserError(
            "precision=fp16: not with parallel=fsdp, whose ranks would scale losses apart; use precision=bf16"
        )
    if cpu_offload and device.type != "cuda":
        raise UserError(
            "parallel.cpu_offload=true: there is no GPU to take weights from; set parallel.cpu_offload=false"
        )
    world = current()
    if world is not None and shards is not None and world.size % shards:
        raise UserError(
            f"parallel.shards={shards}: {world.size} processes cannot form groups of {shards}; allowed: divisors of "
            f"{world.size}, or null for all"
        )
    joined = join("fsdp", device, **keys)
    if joined is None:
        return Mode(device, "fsdp")
    group, device = joined
    return FullySharded(
        group,
        device,
        accumulate=accumulate,
        sync_batchnorm=sync_batchnorm,
        shards=group.size if shards is None else shards,
        unit_parameters=unit_parameters,
        reshard_after_forward=reshard_after_forward,
        sync_every_micro_batch=sync_every_micro_batch,
        cpu_offload=cpu_offload,
        low_precision=precision == "bf16",
    )


class FullySharded(DataParallel):
    """Data parallelism whose parameters are DTensors, sharded along their first dimension."""

    sharding: Literal["replicated", "tensors", "layers"] = "tensors"

    def __init__(
        self,
        group: Group,
        device: torch.device,
        *,
        accumulate: int,
        sync_batchnorm: bool,
        shards: int,
        unit_parameters: int,
        reshard_after_forward: bool,
        sync_every_micro_batch: bool,
        cpu_offload: bool,
        low_precision: bool,
    ) -> None:
        super().__init__(
            group,
            device,
            accumulate=accumulate,
            sync_batchnorm=sync_batchnorm,
            compression="none",
            options={},
            name="fsdp",
        )
        self.shards = shards
        self.unit_parameters = unit_parameters
        self.reshard_after_forward = reshard_after_forward
        self.sync_every_micro_batch = sync_every_micro_batch
        self.cpu_offload = cpu_offload
        self.low_precision = low_precision

    def checkpoint_writer(self) -> ShardWriter:
        return ShardWriter(self.rank, minutes=self.group.minutes)

    def place(self, model: nn.Module, input_shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        if self.sync_batchnorm:
            synchronize(model, self.device)
        make_global(model, self.dropout)
        model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no others; layers follow the format of inputs
        self._shard(model)
        if not self.sync_every_micro_batch:
            self._no_sync = lambda: _unsynchronized(model)

        def call(inputs: Tensor) -> Tensor:
            outputs: Tensor
            if torch.is_grad_enabled():
                outputs = model(inputs)
                return outputs
            with torch.inference_mode(False), torch.no_grad():  # what is put together must serve in training, too
                outputs = model(inputs)
            _reshard(model)  # no backward will do so, and weights may change before the next forward
            return outputs

        return call

    def _shard(self, model: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        copies = self.processes // self.shards
        form = ((self.shards,), ("shard",)) if copies == 1 else ((copies, self.shards), ("replicate", "shard"))
        mesh = init_device_mesh(self.device.type, form[0], mesh_dim_names=form[1])
        options: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "offload_policy": CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
        }
        if self.low_precision:
            # Weights travel as the bf16 in which autocast would use them; norms keep fp32, as under autocast.
            norms: list[nn.Module] = [m for m in model.modules() if isinstance(m, _NORMS) and [*m.parameters()]]
            if norms:
                fully_shard(norms, **options)
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for unit in units(model, self.unit_parameters):
            fully_shard(unit, **options)
        fully_shard(model, **options)


def units(model: nn.Module, least: int) -> list[nn.Module]:
    """The blocks that are put together one at a time: what stands in containers, from so many parameters on.

    What is smaller stays with the whole model, and so does what shares parameters with another block.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, _CONTAINERS) and type(child).forward in (each.forward for each in _CONTAINERS):
                look(child)
            elif sum(p.numel() for p in child.parameters()) >= max(least, 1):
                found.append(child)

    look(model)
    owners: dict[nn.Parameter, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return [unit for unit in found if all(owners[p] == 1 for p in unit.parameters())]


@contextmanager
def _unsynchronized(model: nn.Module) -> Iterator[None]:
    """Within, gradients stay where they are computed, whole; the next backward outside adds them up over ranks."""
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)  # type: ignore[operator]


def _reshard(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
