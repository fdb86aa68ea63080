"""What the optimizers share: how they call a closure, walk over parameters and see them as one vector."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlopt.errors import UserError

Closure = Callable[[], Any]
_CACHE = 1 << 18  # elements: what an update touches of them stays in a core's cache from one operation to the next


class LossClosure:
    """The closure of a loop that has nothing but a function for the loss: `optimizer.step(LossClosure(optimizer,
    loss))`.

    Calling it clears the gradients, runs `loss()` backward and returns the detached loss; `closure.loss()` gives the
    differentiable loss, which Newton's methods need for products with the Hessian.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        self.loss = loss
        self._optimizer = optimizer

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = self.loss()
            loss.backward()
        return loss.detach()


def evaluate(closure: Closure | None) -> Any:
    """The closure's loss, or None without a closure: the gradients are there already."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def needs_closure(optimizer: torch.optim.Optimizer, closure: Closure | None) -> Closure:
    if closure is None:
        raise UserError(
            f"{type(optimizer).__name__}: evaluates the loss several times in a step; call step(closure) with a "
            f"function that clears the gradients, runs forward and backward and returns the loss"
        )
    return closure


def differentiable_loss(optimizer: torch.optim.Optimizer, closure: Closure) -> Callable[[], Tensor]:
    """`closure.loss`: the loss with its graph, without a backward pass. Raises UserError for a plain function."""
    loss: Callable[[], Tensor] | None = getattr(closure, "loss", None)
    if loss is None:
        raise UserError(
            f"{type(optimizer).__name__}: needs second derivatives; the closure must offer loss(), which returns the "
            f"differentiable loss without running backward (dlopt.optim.LossClosure makes such a closure)"
        )
    return loss


def chunks(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters that have a gradient, in lists for torch's foreach functions.

    On an accelerator one list per device and dtype, so that an operation is one kernel; on a CPU lists that fit into
    the cache, since there an operation over all parameters would fetch every one of them from memory again.
    """
    elsewhere: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    here: list[Tensor] = []
    size = 0
    for p in params:
        if p.grad is None:
            continue
        if p.device.type != "cpu":
            elsewhere.setdefault((p.device, p.dtype), []).append(p)
            continue
        if here and size + p.numel() > _CACHE:
            yield here
            here, size = [], 0
        here.append(p)
        size += p.numel()
    if here:
        yield here
    yield from elsewhere.values()


def gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def buffers(optimizer: torch.optim.Optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """The state tensors of that name, zero at first, shaped and laid out like the parameters."""
    found = []
    for p in params:
        state = optimizer.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        found.append(state[name])
    return found


def count_steps(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[int]:
    """Counts this update for each parameter and returns the counts, from 1. Kept as CPU tensors, as torch does."""
    counts = []
    for p in params:
        state = optimizer.state[p]
        state["step"] = state["step"] + 1 if "step" in state else torch.tensor(1.0)
        counts.append(int(state["step"]))
    return counts


def as_groups(params: ParamsT) -> list[dict[str, Any]]:
    """What an optimizer may be given, as groups that are the caller's no more."""
    given: list[Any] = list(params)
    if all(isinstance(entry, dict) for entry in given):
        return [{**group, "params": _tensors(group["params"])} for group in given]
    return [{"params": _tensors(given)}]


def _tensors(params: Any) -> list[Tensor]:
    if isinstance(params, Tensor):
        return [params]
    return [p[1] if isinstance(p, tuple) else p for p in params]


def refuse_own_rates(name: str, lr: float, groups: Iterable[dict[str, Any]]) -> None:
    """Raises UserError for groups with rates of their own: a line search has one step length for all parameters."""
    for group in groups:
        if group.get("lr", lr) != lr:
            raise UserError(
                f"optimizer={name}: one step length goes for all parameters; a group with a learning rate of its own "
                f"({group['lr']:g} beside {lr:g}) is not possible"
            )


def trainable(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def flat_gradient(params: list[Tensor]) -> Tensor:
    return flat(p.grad if p.grad is not None else torch.zeros_like(p) for p in params)


def assign(params: list[Tensor], vector: Tensor) -> None:
    """Writes the vector into the parameters, in their order."""
    offset = 0
    for p in params:
        p.copy_(vector[offset : offset + p.numel()].view(p.shape))
        offset += p.numel()


def refuse_above(name: str, params: list[Tensor], most: int, instead: str) -> None:
    """Raises UserError when a dense matrix over the parameters would be larger than allowed."""
    n = sum(p.numel() for p in params)
    if n > most:
        size = n * n * params[0].element_size() / 2**30
        raise UserError(
            f"optimizer={name}: the model has {n:,} parameters, and the method keeps a matrix of their number squared "
            f"({size:,.1f} GiB); allowed are {most:,} (optimizer.max_parameters); for larger models take "
            f"optimizer={instead}"
        )
