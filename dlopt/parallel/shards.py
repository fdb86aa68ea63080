"""Tensors that are cut over processes (DTensors), and plain ones: what is asked of both alike.

Nothing here imports torch's DTensor unless there is one: it takes a while.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


def is_cut(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """What this process has of the tensor, in the same memory."""
    if not is_cut(tensor):
        return tensor
    own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return own


def whole(state: T) -> T:
    """A state (nested dicts and lists) with whole tensors on every process. All processes have to join."""
    found: Any = state
    if is_cut(state):
        found = state.full_tensor()  # type: ignore[attr-defined]
    elif isinstance(state, dict):
        found = {key: whole(value) for key, value in state.items()}
    elif isinstance(state, list):
        found = [whole(value) for value in state]
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
    if like is None or not is_cut(like) or not isinstance(value, Tensor) or value.shape != like.shape:
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
        return total_norm([tensor]) if is_cut(tensor) else torch.linalg.vector_norm(tensor)
    norms = torch.linalg.vector_norm(local(tensor), dim=tuple(range(1, tensor.ndim)), keepdim=True)
    across = tuple(each for each in _sharing(tensor) if each[2] != 0)  # pieces of rows
    return _summed(norms.square(), across).sqrt() if across else norms


def _sharing(tensor: Tensor) -> tuple[tuple[Any, int, int], ...]:
    """(mesh, dimension of the mesh, dimension of the tensor that is cut along it) for each cut."""
    if not is_cut(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if any(each.is_partial() for each in placements):
        raise TypeError(f"a tensor of {placements} is a summand and no part of a whole")
    return tuple((mesh, axis, each.dim) for axis, each in enumerate(placements) if not each.is_replicate())


def _summed(values: Tensor, sharing: Sequence[tuple[Any, int, int]]) -> Tensor:
    for mesh, axis, _ in sharing:
        distributed.all_reduce(values, group=mesh.get_group(axis))
    return values


class Cut:
    """See `dlopt.parallel.single.Whole`: for modes whose parameters are DTensors."""

    splits: Literal["nothing", "tensors", "layers"] = "tensors"
    gathered = staticmethod(whole)
    load_model = staticmethod(load_model)
    load_optimizer = staticmethod(load_optimizer)
    norm = staticmethod(total_norm)
