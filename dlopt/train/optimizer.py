"""The optimizer of an experiment over the parameters of its model."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlopt.config.experiment import Experiment
from dlopt.config.schema import Component
from dlopt.errors import UserError
from dlopt.parallel.shards import is_cut
from dlopt.parameters import parameter_groups
from dlopt.train.build import Setup


def optimizer_of(setup: Setup) -> torch.optim.Optimizer:
    """The optimizer over the model's parameter groups; its learning rate follows the batch size where that is asked."""
    experiment, settings = setup.experiment, setup.experiment.settings
    component = experiment.optimizer
    if experiment.auto_lr:
        raise UserError("optimizer.lr=auto: only `dlopt train` looks for the learning rate; type a number here")
    if settings.scale_lr != "none":
        component = component.partial(lr=component.arguments["lr"] * _lr_scale(experiment, len(setup.dataset.train)))
    groups = parameter_groups(
        setup.module, experiment.grouping, component.arguments, decay_norm_and_bias=settings.decay_norm_and_bias
    )
    fused = may_fuse(component, [p for group in groups for p in group["params"]])
    try:
        optimizer: torch.optim.Optimizer = component.partial(**({"fused": True} if fused else {})).build(params=groups)
    except ValueError as error:  # a class that is not ours has a range of its own, or takes one group only
        raise UserError(f"optimizer={component.target.__name__}: {error}") from None
    check_optimizer(setup.parallel, optimizer)
    if fused:
        keep_layout(optimizer)
    return optimizer


_FUSED = {"cpu": ("SGD", "Adam", "AdamW", "Adagrad"), "cuda": ("SGD", "Adam", "AdamW")}  # of torch.optim


def may_fuse(component: Component, parameters: Sequence[Tensor]) -> bool:
    """Whether torch has one kernel for an update of all these parameters, and nothing is typed about it.

    On a CPU it spares a small model a tenth of its step. See `keep_layout` for what it takes for granted.
    """
    target, devices = component.target, {p.device.type for p in parameters if not p.is_meta}
    if target.__module__.partition(".")[0] != "torch" or {"fused", "foreach"} & set(component.arguments):
        return False
    fusing = [name for device in devices for name in _FUSED.get(device, ())]
    return len(devices) == 1 and target.__name__ in fusing and not any(map(is_cut, parameters))


def keep_layout(optimizer: torch.optim.Optimizer) -> None:
    """Sees to it that states lie in memory as their parameters do: the one kernel goes through all of them side by
    side, and would mix up the elements of others. Gradients do, by autograd's contract, which the first update checks.

    A loaded state may come from another mode, and lie otherwise.
    """

    def lay_out(optimizer: torch.optim.Optimizer) -> None:
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and not _is_alike(value, parameter):
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def check(optimizer: torch.optim.Optimizer, arguments: object, named: object) -> None:
        first.remove()
        for group in optimizer.param_groups:
            if not all(p.grad is None or _is_alike(p.grad, p) for p in group["params"]):
                group["fused"] = False

    optimizer.register_load_state_dict_post_hook(lay_out)
    first = optimizer.register_step_pre_hook(check)


def _is_alike(tensor: Tensor, parameter: Tensor) -> bool:
    return tensor.is_meta or tensor.stride() == parameter.stride()


_NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon")  # of torch.optim, which does not say so


def check_optimizer(parallel: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raises `UserError` where an update needs more of the model at once than a rank has of it."""
    kind = type(optimizer)
    name = f"parallel={parallel.name}: {kind.__name__}"
    others = "use parallel=ddp or an optimizer that works element by element (sgd, adamw, ...)"
    is_torchs = kind.__module__.startswith("torch.")
    alone = getattr(kind, "elementwise", not (is_torchs and kind.__name__ in _NOT_ELEMENTWISE))
    if parallel.splits == "tensors" and not alone:
        raise UserError(f"{name} needs whole tensors or the whole model for an update, and ranks have parts; {others}")
    many = getattr(optimizer, "evaluations", "many" if isinstance(optimizer, torch.optim.LBFGS) else "once") == "many"
    if parallel.splits == "layers" and many:
        raise UserError(f"{name} looks at all layers at once for an update, and each rank has some of them; {others}")


def _lr_scale(experiment: Experiment, count: int) -> float:
    size = experiment.data_settings.batch_size
    ratio = (count if size == "full" else size) / experiment.settings.scale_lr_reference
    return math.sqrt(ratio) if experiment.settings.scale_lr == "sqrt" else ratio


def evaluations(setup: Setup, optimizer: torch.optim.Optimizer) -> str:
    """Whether the optimizer evaluates the loss once or many times per update: it says so, or it is torch's L-BFGS."""
    many = isinstance(optimizer, torch.optim.LBFGS)
    declared: str = getattr(optimizer, "evaluations", "many" if many else "once")
    if declared == "many" and setup.precision.name == "fp16":
        raise UserError(
            f"precision=fp16: {type(optimizer).__name__} evaluates the loss several times per update, "
            "which loss scaling cannot follow; use precision=bf16 or fp32"
        )
    return declared
