"""States and norms of models that are spread over processes: as DTensors, or layer by layer.

The first half treats plain tensors and DTensors alike, and imports torch's DTensor only where there is one, because
the import is slow. The second half is for modes in which each rank holds some layers and the others are on the meta
device: every rank knows all parameters by name and order.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from dlopt.parallel.process_group import Group

T = TypeVar("T")


def is_sharded_tensor(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """What this process has of the tensor, in the same memory."""
    if not is_sharded_tensor(tensor):
        return tensor
    own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return own


def full_state(state: T) -> T:
    """A state (nested dicts and lists) with whole tensors on every process. All processes have to join."""
    found: Any = state
    if is_sharded_tensor(state):
        found = state.full_tensor()  # type: ignore[attr-defined]
    elif isinstance(state, dict):
        found = {key: full_state(value) for key, value in state.items()}
    elif isinstance(state, list):
        found = [full_state(value) for value in state]
    return found


def load_model(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Loads whole tensors by name, of which each process takes its part."""
    own = model.state_dict()
    model.load_state_dict({name: _part(value, own.get(name)) for name, value in state.items()}, strict=strict)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The same for an optimizer's state: what is shaped like a parameter is cut as the parameter is."""
    likes: dict[int, Tensor] = {}
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        likes.update(zip(saved["params"], group["params"], strict=True))
    parts = {
        number: {name: _part(value, likes.get(number)) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _part(value: Any, like: Tensor | None) -> Any:
    if like is None or not is_sharded_tensor(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(
        value.to(like.device), mesh, placements, src_data_rank=None
    )  # all have it: nothing is sent


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors taken as one vector: a plain scalar, equal on the processes that have parts of them.

    Per set of processes that share tensors there is one exchange of a number.
    """
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(_sharing(tensor), []).append(local(tensor))
    norms = []
    for sharing, own in groups.items():
        norm = torch.nn.utils.get_total_norm(own)
        norms.append(_summed(norm.square(), sharing).sqrt() if sharing else norm)
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def unit_norm(tensor: Tensor) -> Tensor:
    """The 2-norms of the rows of a weight [N, ...], as [n, 1, ...] with n the rows that this process has of it; of a
    vector the norm of all of it."""
    if tensor.ndim <= 1:
        return total_norm([tensor]) if is_sharded_tensor(tensor) else torch.linalg.vector_norm(tensor)
    norms = torch.linalg.vector_norm(local(tensor), dim=tuple(range(1, tensor.ndim)), keepdim=True)
    across = tuple(each for each in _sharing(tensor) if each[2] != 0)  # pieces of rows
    return _summed(norms.square(), across).sqrt() if across else norms


def _sharing(tensor: Tensor) -> tuple[tuple[Any, int, int], ...]:
    """(mesh, dimension of the mesh, dimension of the tensor that is cut along it) for each cut."""
    if not is_sharded_tensor(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(each.is_partial() for each in placements):
        raise TypeError(f"a tensor of {placements} is a summand and no part of a whole")
    return tuple((mesh, axis, each.dim) for axis, each in enumerate(placements) if not each.is_replicate())


def _summed(values: Tensor, sharing: Sequence[tuple[Any, int, int]]) -> Tensor:
    for mesh, axis, _ in sharing:
        distributed.all_reduce(values, group=mesh.get_group(axis))
    return values


# -- layers on different ranks


def stage_norm(tensors: Sequence[Tensor], group: "Group", device: torch.device, *, is_copy: bool = False) -> Tensor:
    """Returns the 2-norm of all ranks' tensors taken as one vector.

    `is_copy`: another rank holds the same layers, which count once.
    """
    own = [] if is_copy else [tensor for tensor in tensors if not tensor.is_meta]
    norm = torch.nn.utils.get_total_norm(own) if own else torch.zeros((), device=device)
    return torch.linalg.vector_norm(group.gathered(norm.to(device=device, dtype=torch.float64).reshape(1)))


def stage_full_state(state: T, group: "Group", *, is_copy: bool = False) -> T:
    """Returns, on rank 0, the state with the tensors of all ranks. All ranks call this together."""
    states: list[Any] | None = [None] * group.size if group.rank == 0 else None
    distributed.gather_object(None if is_copy else _on_cpu(state), states, dst=0)
    for other in (states or [])[1:]:
        state = state if other is None else _merged(state, other)
    return state


def load_stage_model(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """Loads the tensors that this rank holds."""
    own = model.state_dict()
    part = {name: own[name] if name in own and own[name].is_meta else value for name, value in state.items()}
    model.load_state_dict(part, strict=strict)


def load_stage_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The same for an optimizer's state."""
    own: set[int] = set()
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        own |= {n for n, p in zip(saved["params"], group["params"], strict=True) if not p.is_meta}
    optimizer.load_state_dict({**state, "state": {n: v for n, v in state["state"].items() if n in own}})


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state if state.is_meta else state.cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else state


def _merged(state: Any, other: Any) -> Any:
    """`state` with what only `other` has."""
    if isinstance(state, dict):
        both = {key: _merged(value, other[key]) if key in other else value for key, value in state.items()}
        both.update((key, value) for key, value in other.items() if key not in state)
        numbered = all(isinstance(key, int) for key in both)  # an optimizer's parameters, in their order
        return {key: both[key] for key in (sorted(both) if numbered else both)}
    return other if isinstance(state, Tensor) and state.is_meta else state
