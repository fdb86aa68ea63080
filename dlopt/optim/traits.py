"""What training has to know about an optimizer: `OptimizerTraits`."""

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.torch_version import TorchVersion

from dlopt.basics.calls import can_call
from dlopt.basics.errors import UserError

Shape = tuple[float, ...]
"""Sizes may be fractions: of a base width that the layout of the model does not allow."""


@dataclass(frozen=True)
class StepSize:
    """How long the step of a tensor is, by its shape: what `init=mup` has to know.

    Attributes:
        growth: (parameter group, shape, smaller shape) -> how many times longer a step is at the same learning rate:
            its spectral norm as a matrix [first dimension, everything else], if the rank of gradients does not grow.
        keys: keys of the group that multiply the step.
        damping: key of the group that is added to the squared singular values of gradients.
    """

    growth: Callable[[Mapping[str, Any], Shape, Shape], float]
    keys: tuple[str, ...] = ("lr",)
    damping: str | None = None


def entrywise_growth(group: Mapping[str, Any], shape: Shape, base: Shape) -> float:
    """Of a matrix of rank one with entries of about 1, as Adam's steps are."""
    return math.sqrt(math.prod(shape) / math.prod(base))


def independent_growth(group: Mapping[str, Any], shape: Shape, base: Shape) -> float:
    """Of a matrix with entries of about 1 that have no common direction: a random, or a scaled orthogonal matrix."""
    return math.sqrt(max(shape[0] / base[0], math.prod(shape[1:]) / math.prod(base[1:])))


@dataclass(frozen=True)
class OptimizerTraits:
    """The traits of an optimizer: the attribute or property `traits` of its class.

    Each missing trait has the default, the conservative value: it may cost speed or exclude a mode of parallelism, but
    never gives a wrong result.

    Attributes:
        scope: what the update of an element depends on: the gradients of this element alone ("element"), of its tensor
            ("tensor"), or of other tensors ("model"). Shards of tensors need "element", shards of models no "model".
        evaluations: of the loss in an update: "once", or "many", by `step(closure)`.
        uses_all_gradients: with many evaluations: all their gradients enter the update, so none may be non-finite (a
            line search may reject one).
        ignores_clipping: the update uses the gradient of `closure.loss()`, not the clipped gradient of the closure.
        samples_labels: `step` calls `closure.sampled_loss`.
        rests_at_zero_lr: at a learning rate of zero an update changes no weight.
        normalizes_entries: the update is invariant to per-coordinate rescaling of the gradient, as for Adam.
        separable: updating some tensors and then the others, in two calls of `step`, equals updating all in one: the
            scope is a tensor at most, and nothing is counted per call.
        capturable: a CUDA graph can capture an update: none of its decisions depends on the value of a tensor.
        decoupled_decay: an update subtracts lr * weight_decay * theta (at least to first order), with the keys of the
            group, and does not depend on weight_decay otherwise.
        step_size: the length of a step by the shape of its tensor; None if unknown, unless `normalizes_entries`.
    """

    scope: Literal["element", "tensor", "model"] = "model"
    evaluations: Literal["once", "many"] = "once"
    uses_all_gradients: bool = False
    ignores_clipping: bool = False
    samples_labels: bool = False
    rests_at_zero_lr: bool = False
    normalizes_entries: bool = False
    separable: bool = False
    capturable: bool = False
    decoupled_decay: bool = False
    step_size: StepSize | None = None


_UNKNOWN = OptimizerTraits()
_UNKNOWN_WITH_CLOSURE = OptimizerTraits(evaluations="many")
ELEMENTWISE = OptimizerTraits(scope="element", rests_at_zero_lr=True, separable=True)  # as SGD
ADAPTIVE = replace(ELEMENTWISE, normalizes_entries=True)  # as Adam
DECOUPLED = replace(ELEMENTWISE, decoupled_decay=True)  # whatever becomes of the gradient
AS_ADAMW = replace(ADAPTIVE, decoupled_decay=True)

# torch's Rprop assigns to selected elements, which torch 2.11 does not support for shards.
_RPROP_SCOPE: Literal["element", "tensor"] = "element" if TorchVersion(torch.__version__) >= "2.12" else "tensor"
_OF_TORCH = {
    "ASGD": ELEMENTWISE, "SparseAdam": ELEMENTWISE, "Adadelta": ELEMENTWISE,
    "Adagrad": ADAPTIVE, "Adamax": ADAPTIVE, "NAdam": ADAPTIVE,
    "RMSprop": ADAPTIVE, "RAdam": ELEMENTWISE,  # its first five updates are gradient descent
    "SGD": ELEMENTWISE, "Adam": ADAPTIVE, "AdamW": AS_ADAMW,
    "Rprop": OptimizerTraits(scope=_RPROP_SCOPE, separable=True),  # its step sizes start at lr, and do not follow it
    "Adafactor": replace(ELEMENTWISE, scope="tensor", decoupled_decay=True),
    "Muon": replace(ELEMENTWISE, scope="tensor", decoupled_decay=True),
    "LBFGS": OptimizerTraits(evaluations="many"),
}  # fmt: skip


def optimizer_traits(optimizer: torch.optim.Optimizer) -> OptimizerTraits:
    """Returns the traits of an optimizer; known for torch's own classes, but not for their subclasses.

    Of a class without traits, it is known that it evaluates the loss itself if its `step` requires a closure.

    Raises `UserError` for traits that are not `OptimizerTraits`, and for a `step` whose signature contradicts them.
    """
    kind = type(optimizer)
    declared: Any = getattr(optimizer, "traits", None)
    if declared is not None and not isinstance(declared, OptimizerTraits):
        raise UserError(f"{kind.__qualname__}.traits={declared!r}: must be a dlopt.optim.OptimizerTraits")
    if declared is None and kind.__module__.startswith("torch.optim."):
        traits, groups = _OF_TORCH.get(kind.__name__, _UNKNOWN), optimizer.param_groups
        fused = all(group.get("fused") for group in groups)  # torch's fused kernels for CUDA
        return replace(traits, capturable=fused, decoupled_decay=traits.decoupled_decay or is_decoupled(groups))
    signature = inspect.signature(optimizer.step)
    ways = {"once": 0, "many": 1}  # number of arguments of `step`
    callable_ways = [way for way, count in ways.items() if can_call(optimizer.step, count)]
    if declared is None and callable_ways:
        return _UNKNOWN if callable_ways[0] == "once" else _UNKNOWN_WITH_CLOSURE
    if declared is None or declared.evaluations not in callable_ways:
        stated = "" if declared is None else f" with traits that state evaluations={declared.evaluations!r}"
        raise UserError(
            f"{kind.__qualname__}.step{signature}{stated}: dlopt calls step() after it has computed the gradients, or "
            "step(closure) where evaluations='many' or the argument has no default"
        )
    return declared


def not_evaluated(optimizer: torch.optim.Optimizer) -> UserError:
    """Returns the error of an update in which `step(closure)` has not called its closure."""
    return UserError(
        f"{type(optimizer).__qualname__}.step(closure): did not call its closure, which computes the loss and the "
        "gradients; call it in every update, or define step(self, closure=None) for gradients that are computed before"
    )


def refuse_missing_closure(optimizer: torch.optim.Optimizer, error: Exception) -> None:
    """Raises `UserError` if `step()` failed with `error` because it needs a closure that its signature leaves out.

    The line that failed, or the message, names the closure: `closure()`, `assert closure is not None`.
    """
    *_, frame = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, UserError) and "closure" in f"{frame.line} {error}":
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{type(optimizer).__qualname__}.step(): fails without a closure: {reason}; set traits = "
            "dlopt.optim.OptimizerTraits(evaluations='many'), or give the argument no default"
        ) from error


def is_unknown(traits: OptimizerTraits) -> bool:
    """Whether the class of the optimizer states no traits, and torch does not have it."""
    return traits is _UNKNOWN or traits is _UNKNOWN_WITH_CLOSURE


def is_decoupled(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the key decoupled_weight_decay of some optimizers is set in all groups."""
    return all(group.get("decoupled_weight_decay", False) for group in groups)


def is_schedule_free(kind: Callable[..., Any]) -> bool:
    """Whether the weights to evaluate are other ones than those to train, as in the package `schedulefree`.

    `optimizer.eval()` then puts the former into the model, and `optimizer.train()` the latter.
    """
    return hasattr(kind, "eval") and hasattr(kind, "train")
