"""Helpers of the optimizers: closures, chunks of parameters for foreach functions, parameters as one vector."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT

from dlopt.basics.errors import UserError
from dlopt.optim.hyperball import check_hyperball

Closure = Callable[[], Any]
Tensors = list[Tensor] | tuple[Tensor, ...]
SampledLoss = Callable[[int], tuple[Tensor, int]]
_CHUNK = 1 << 18  # elements: a chunk's parameters, gradients and state fit into the cache of a CPU core


class LossClosure:
    """Closure for a loop that has only a function for the loss: `optimizer.step(LossClosure(optimizer, loss))`.

    A call zeroes the gradients, runs backward on `loss()` and returns the detached loss. `closure.loss()` returns the
    differentiable loss, which Newton methods need for Hessian-vector products. `sampled_loss(seed)` returns (the mean
    loss for labels drawn from the model's predictions, the number of predictions), which Sophia needs with hessian=gnb.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], sampled_loss: SampledLoss | None = None
    ) -> None:
        self.loss = loss
        self.sampled_loss = sampled_loss
        self._optimizer = optimizer

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad()
        with torch.inference_mode(False), torch.enable_grad():
            loss = self.loss()
            loss.backward()
        return loss.detach()


def loss_of(closure: Closure | None) -> Any:
    """Calls the closure and returns its loss; without a closure returns None (the gradients have been computed)."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def needs_closure(optimizer: torch.optim.Optimizer, closure: Closure | None) -> Closure:
    if closure is None:
        raise UserError(
            f"{type(optimizer).__name__}: evaluates the loss several times per step; call step(closure) with a "
            f"function that zeroes the gradients, runs forward and backward and returns the loss"
        )
    return closure


def differentiable_loss(optimizer: torch.optim.Optimizer, closure: Closure) -> Callable[[], Tensor]:
    """Returns `closure.loss`, which computes the loss without a backward pass. Raises `UserError` if there is none."""
    loss: Callable[[], Tensor] | None = getattr(closure, "loss", None)
    if loss is None:
        raise UserError(
            f"{type(optimizer).__name__}: needs second derivatives; the closure must offer loss(), which returns the "
            f"differentiable loss without running backward (dlopt.optim.LossClosure makes such a closure)"
        )
    return loss


def sampled_loss(optimizer: torch.optim.Optimizer, closure: Closure) -> SampledLoss:
    """Returns `closure.sampled_loss` (see `LossClosure`). Raises `UserError` if there is none."""
    loss: SampledLoss | None = getattr(closure, "sampled_loss", None)
    if loss is None:
        raise UserError(
            f"{type(optimizer).__name__}: draws labels from the model's predictions; the closure must offer "
            "sampled_loss(seed), which returns the mean loss for such labels and the number of predictions"
        )
    return loss


def chunks(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the parameters that have a gradient and elements, in lists for torch's foreach functions.

    On an accelerator one list per device and dtype, so that an operation is one kernel. On a CPU lists that fit into
    the cache: an operation over all parameters would read all of them from main memory again.
    """
    by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    chunk: list[Tensor] = []
    size = 0
    for p in params:
        if p.grad is None or not p.numel():
            continue
        if p.device.type != "cpu":
            by_device.setdefault((p.device, p.dtype), []).append(p)
            continue
        if chunk and size + p.numel() > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(p)
        size += p.numel()
    if chunk:
        yield chunk
    yield from by_device.values()


class ForeachOptimizer(torch.optim.Optimizer):
    """Base of optimizers that use one gradient per step and update the parameters chunk by chunk."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = loss_of(closure)
        for group in self.param_groups:
            for params in chunks(group["params"]):
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Updates parameters of a group, which all have gradients."""
        raise NotImplementedError


class RealOptimizer(ForeachOptimizer):
    """Base of the foreach optimizers that refuse complex parameters, whose values they would square or compare."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        refuse_complex(type(self).__name__.lower(), self.param_groups[-1]["params"])
        check_hyperball(self.param_groups[-1])


def fill_defaults(optimizer: torch.optim.Optimizer) -> None:
    """Adds defaults to the groups of a loaded state for keys that a newer torch or schedulefree has introduced."""
    for group in optimizer.param_groups:
        for key, value in optimizer.defaults.items():
            if key != "differentiable":  # torch adds it to the defaults when it loads a state, but not to the groups
                group.setdefault(key, value)


def without_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the bound `step` of an optimizer's class without the hooks in which torch has wrapped it."""
    method: Any = step
    function = method.__func__
    while hasattr(function, "hooked"):  # torch.compile of torch 2.11 wraps L-BFGS once more, around the hooks
        function = function.__wrapped__
    unhooked: Callable[..., Any] = function.__get__(method.__self__)
    return unhooked


@contextmanager
def without_global_step_hooks() -> Iterator[None]:
    """Skips torch's global step hooks in the step of an inner optimizer, since they run for the outer one."""
    pre, post = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    torch_optimizer._global_optimizer_pre_hooks = OrderedDict()
    torch_optimizer._global_optimizer_post_hooks = OrderedDict()
    try:
        yield
    finally:
        torch_optimizer._global_optimizer_pre_hooks = pre
        torch_optimizer._global_optimizer_post_hooks = post


def gradients(params: list[Tensor]) -> list[Tensor]:
    """Returns the gradients. Raises `UserError` for sparse ones, which no optimizer of dlopt updates."""
    grads = [p.grad for p in params if p.grad is not None]
    if any(grad.is_sparse for grad in grads):
        raise UserError("optimizer: sparse gradients are not supported; use nn.Embedding(..., sparse=False)")
    return grads


def is_dense(p: Tensor) -> bool:
    """Whether the elements of `p` fill its memory without gaps or overlaps."""
    return p.numel() == 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def buffers(optimizer: torch.optim.Optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """Returns the state tensors `name`, with the parameters' shapes and memory formats; initially zero."""
    tensors = []
    for p in params:
        state = optimizer.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        tensors.append(state[name])
    return tensors


def count_steps(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[int]:
    """Increments the update count of each parameter and returns the counts. Stores CPU tensors, as torch does."""
    counts = []
    for p in params:
        state = optimizer.state[p]
        # The bias correction needs the count on the host, and reading it from a GPU would wait for the device.
        state["step"] = state["step"] + 1 if "step" in state else torch.tensor(1.0)
        counts.append(int(state["step"]))
    return counts


def move(group: dict[str, Any], params: list[Tensor], updates: Tensors) -> None:
    """theta <- (1 - lr * weight_decay) * theta - lr * update: a step with decoupled weight decay."""
    lr = group["lr"]
    # Before the update: the decay shrinks the weights at which the gradient was computed (Loshchilov & Hutter 2019,
    # algorithm 2), and not the update itself.
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    if isinstance(lr, Tensor):  # in a CUDA graph, which reads no value on the host
        torch._foreach_sub_(params, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(params, updates, alpha=-lr)


def signs(tensor: Tensor) -> Tensor:
    """Returns the signs of the entries, NaN where one is not finite: torch's sign of NaN is 0, and hides it."""
    return tensor.sign().add_(tensor, alpha=0.0)


def make_cautious(updates: Iterable[Tensor], grads: Iterable[Tensor]) -> None:
    """Zeroes, in place, update entries whose sign differs from the gradient's, and scales up the others.

    Cautious optimizers (Liang et al. 2024, algorithm 1): u <- u * mask * d / (nnz + 1) for each tensor of d entries, of
    which the mask u * g > 0 keeps nnz. The authors' present code scales by d / nnz, at most 1000, instead.
    """
    for update, grad in zip(updates, grads, strict=True):
        mask = update * grad > 0
        update.mul_(mask).mul_(update.numel() / (mask.sum(dtype=update.dtype) + 1))


def refuse_complex(name: str, params: Iterable[Tensor]) -> None:
    """Raises `UserError` for complex parameters: the optimizer squares or compares values."""
    if any(p.is_complex() for p in params):
        raise UserError(f"optimizer={name}: complex parameters are not supported; use adamw or sgd")


class _Groups(torch.optim.Optimizer):
    """Parses and checks `params` as every optimizer of torch does."""


def as_groups(params: ParamsT) -> list[dict[str, Any]]:
    """Converts any `params` argument of an optimizer into a new list of group dicts.

    "params" is a list of tensors; named parameters also have "param_names". Raises torch's errors for anything else.
    """
    given: Any = params
    if not isinstance(params, (Tensor, set)):
        given = [dict(entry) if isinstance(entry, dict) else entry for entry in params]
    return _Groups(given, {}).param_groups


def refuse_group_rates(name: str, lr: float, groups: Iterable[dict[str, Any]]) -> None:
    """Raises `UserError` for groups with another learning rate or horizon: a line search has one step length."""
    groups = list(groups)
    if len({group.get("horizon", 1.0) for group in groups}) > 1:
        raise UserError(
            f"optimizer={name}: uses one step length for all parameters; a group cannot have another horizon"
        )
    for group in groups:
        if group.get("lr", lr) != lr:
            raise UserError(
                f"optimizer={name}: uses one step length for all parameters; a group cannot have another learning "
                f"rate ({group['lr']:g} instead of {lr:g})"
            )


def trainable(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def flat_or_zero(tensors: Iterable[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Concatenates one tensor per parameter; None, as autograd returns for unused ones, counts as zero."""
    return flat(torch.zeros_like(p) if t is None else t for t, p in zip(tensors, params, strict=True))


def flat_gradient(params: list[Tensor]) -> Tensor:
    gradients(params)  # refuses sparse ones
    return flat_or_zero((p.grad for p in params), params)


def assign(params: list[Tensor], vector: Tensor) -> None:
    """Copies the vector into the parameters, in their order."""
    offset = 0
    for p in params:
        p.copy_(vector[offset : offset + p.numel()].view(p.shape))
        offset += p.numel()


def refuse_above(name: str, params: list[Tensor], limit: int, alternative: str) -> None:
    """Raises `UserError` if the model has more than `limit` parameters: a dense Hessian has n^2 entries."""
    n = sum(p.numel() for p in params)
    if n > limit:
        size = n * n * params[0].element_size() / 2**30
        raise UserError(
            f"optimizer={name}: stores a matrix of {n:,} x {n:,} values ({size:,.1f} GiB) for a model of {n:,} "
            f"parameters; at most {limit:,} are allowed (optimizer.max_parameters); for larger models use "
            f"optimizer={alternative}"
        )
