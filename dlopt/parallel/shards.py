"""Norms and states of a model, by how a mode shards it: not at all, by tensors (DTensor), or by layers.

The functions accept plain tensors and DTensors, and import torch's DTensor only where needed, because the import is
slow.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from dlopt.parallel.processes.process_group import ProcessGroup

T = TypeVar("T")


def is_sharded_tensor(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, sharing its memory and detached; a plain tensor as it is."""
    if not is_sharded_tensor(tensor):
        return tensor
    return tensor.detach().to_local()  # type: ignore[attr-defined]


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns the elements of a plain tensor as uint8 [bytes], in row-major order."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the full tensor of a DTensor; a plain tensor as it is. All ranks call this together."""
    if not is_sharded_tensor(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    assert isinstance(tensor, DTensor)
    placement = tensor.placements[0]
    if not isinstance(placement, _StridedShard):
        return tensor.full_tensor()
    # torch 2.11 does not gather strided shards. With a dimension for the blocks, the shard is an ordinary one.
    dim, blocks = placement.dim, placement.split_factor
    shape = (*tensor.shape[:dim], blocks, tensor.shape[dim] // blocks, *tensor.shape[dim + 1 :])
    shard = tensor.to_local().unflatten(dim, (blocks, -1)).contiguous()
    strides = torch.empty(shape, device="meta").stride()
    split = DTensor.from_local(
        shard, tensor.device_mesh, [Shard(dim + 1)], run_check=False, shape=torch.Size(shape), stride=strides
    )
    return split.full_tensor().flatten(dim, dim + 1)


def _shard_like(value: Any, like: Tensor | None) -> Any:
    if like is not None and like.is_meta:
        return like
    if like is None or not is_sharded_tensor(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    # src_data_rank=None: every rank has the full value and takes its shard without communication.
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def plain_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm of plain tensors as one vector; in fp32 for bf16 tensors, because bf16 has three digits."""
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack(norms))
    return torch.nn.utils.get_total_norm(tensors)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm of all tensors as one vector: a plain scalar, equal on all ranks that hold shards of them.

    One all-reduce of a scalar per distinct way of sharding, not per tensor.
    """
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(shard_axes(tensor), []).append(local(tensor))
    norms = []
    for axes, shards in groups.items():
        norm = plain_norm(shards)
        norms.append(_all_reduce(norm.square(), axes).sqrt() if axes else norm)
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def unit_norm(tensor: Tensor) -> Tensor:
    """Returns the 2-norms of the n local rows of a weight [N, ...] as [n, 1, ...]; of a vector, its norm."""
    if tensor.ndim <= 1:
        return total_norm([tensor])
    dtype = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
    norms = torch.linalg.vector_norm(local(tensor), dim=tuple(range(1, tensor.ndim)), keepdim=True, dtype=dtype)
    # A rank has whole rows, unless the tensor is also sharded within its rows: then the squares are summed over the
    # ranks that share a row.
    within_rows = tuple(axis for axis in shard_axes(tensor) if axis[2] != 0)
    return _all_reduce(norms.square(), within_rows).sqrt() if within_rows else norms


def shard_axes(tensor: Tensor) -> tuple[tuple[Any, int, int], ...]:
    """Returns (mesh, mesh dimension, tensor dimension) of each mesh dimension over which the tensor is sharded."""
    if not is_sharded_tensor(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise TypeError(f"placements={placements}: partial tensors have no norm before they are reduced")
    return tuple((mesh, axis, p.dim) for axis, p in enumerate(placements) if not p.is_replicate())


def _all_reduce(values: Tensor, axes: Sequence[tuple[Any, int, int]]) -> Tensor:
    # Sums over one mesh dimension after the other: a tensor may be sharded over several.
    for mesh, axis, _ in axes:
        distributed.all_reduce(values, group=mesh.get_group(axis))
    return values


def _merge(state: Any, other: Any) -> Any:
    """Returns `state`, completed with the entries and tensors that only `other` holds."""
    if isinstance(state, dict):
        both = {key: _merge(value, other[key]) if key in other else value for key, value in state.items()}
        both.update((key, value) for key, value in other.items() if key not in state)
        numbered = all(isinstance(key, int) for key in both)  # an optimizer's parameters, in the order of one process
        return {key: both[key] for key in (sorted(both) if numbered else both)}
    return other if isinstance(state, Tensor) and state.is_meta else state


# -- norms and states, by how a model is sharded


Kind = Literal["replicated", "tensors", "layers"]


class Sharding:
    """Norms and states of a model. Here every process holds the full model (single, ddp); subclasses shard it."""

    kind: Kind = "replicated"
    is_by_rows = False  # all tensors are sharded along dimension 0, by the last dimension of their mesh

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the 2-norm of all parameters, or of their gradients, as one vector: a scalar, equal on all ranks.

        A rank may hold shards of the tensors, or only some of them; replicas count once.
        """
        return plain_norm(tensors)

    def full(self, state: T) -> T:
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


class TensorShards(Sharding):
    """Parameters are DTensors; each process holds a shard (fsdp, filter, spatial, hybrid)."""

    kind: Kind = "tensors"

    def __init__(self, *, is_by_rows: bool = False) -> None:
        self.is_by_rows = is_by_rows

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        return total_norm(tensors)

    def full(self, state: T) -> T:
        return tree_map_only(Tensor, full_tensor, state)

    def load_model(self, model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
        # Includes the meta tensors, unchanged, so that names and strictness are the full model's.
        current = model.state_dict()
        shards = {name: _shard_like(value, current.get(name)) for name, value in state.items()}
        model.load_state_dict(shards, strict=strict)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
        parameters = {n: p for saved, group in groups for n, p in zip(saved["params"], group["params"], strict=True)}
        shards = {
            number: {name: _shard_like(value, parameters.get(number)) for name, value in values.items()}
            for number, values in state["state"].items()
            if number not in parameters or not parameters[number].is_meta
        }
        optimizer.load_state_dict({**state, "state": shards})


class LayerShards(TensorShards):
    """Each process holds some layers and has the others on the meta device (pipeline, columns).

    `is_replica`: another rank holds the same layers, which count once.
    """

    kind: Kind = "layers"

    def __init__(self, group: ProcessGroup, device: torch.device, *, is_replica: bool = False) -> None:
        self.group = group
        self.device = device
        self.is_replica = is_replica

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        held = [] if self.is_replica else [tensor for tensor in tensors if not tensor.is_meta]
        norm = torch.nn.utils.get_total_norm(held) if held else torch.zeros((), device=self.device)
        # Gathered, not all-reduced: all ranks combine the same numbers in the same order, so they clip and stop alike.
        norms = self.group.all_gather(norm.to(device=self.device, dtype=torch.float64).reshape(1))
        return torch.linalg.vector_norm(norms)

    def full(self, state: T) -> T:
        states: list[Any] | None = [None] * self.group.size if self.group.rank == 0 else None
        # Rank 0, which writes the checkpoint, collects the layers, pickled and from main memory.
        on_cpu = None if self.is_replica else tree_map_only(Tensor, lambda t: t if t.is_meta else t.cpu(), state)
        distributed.gather_object(on_cpu, states, dst=0)
        for other in (states or [])[1:]:
            state = state if other is None else _merge(state, other)
        return state
