"""States and norms where each process has some of the layers, and the others' are on the meta device."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from dlopt.parallel.group import Group


class Owned:
    """See `dlopt.parallel.single.Whole`. Every rank knows all parameters by name and order, and keeps its own.

    `is_spare`: a process before this one has the same layers.
    """

    splits: Literal["nothing", "tensors", "layers"] = "layers"
    is_spare = False
    group: Group
    device: torch.device

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        own = [] if self.is_spare else [tensor for tensor in tensors if not tensor.is_meta]
        norm = torch.nn.utils.get_total_norm(own) if own else torch.zeros((), device=self.device)
        everyones = self.group.gathered(norm.to(device=self.device, dtype=torch.float64).reshape(1))
        return torch.linalg.vector_norm(everyones)

    def gathered(self, state: Any) -> Any:
        everyones: list[Any] | None = [None] * self.group.size if self.group.rank == 0 else None
        distributed.gather_object(None if self.is_spare else _on_cpu(state), everyones, dst=0)
        for other in (everyones or [])[1:]:
            state = state if other is None else _merged(state, other)
        return state

    def load_model(self, model: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
        own = model.state_dict()
        part = {name: own[name] if name in own and own[name].is_meta else value for name, value in state.items()}
        model.load_state_dict(part, strict=strict)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
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
