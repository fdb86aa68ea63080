"""Builds optimizer and schedule of a config."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt import schedules
from dlopt.basics.errors import UserError
from dlopt.basics.length import Length
from dlopt.basics.random import stream
from dlopt.config.schema import Component
from dlopt.losses import sampling_obstacle
from dlopt.optim import SAM
from dlopt.optim.cautious_decay import make_decay_cautious
from dlopt.optim.common import buffers
from dlopt.optim.parameters import normalized_weights, parameter_groups
from dlopt.optim.traits import is_unknown, optimizer_traits
from dlopt.parallel.mode import Mode
from dlopt.parallel.owners import step_by_owners
from dlopt.parallel.shards import is_sharded_tensor
from dlopt.schedules import Scheduler
from dlopt.schedules.decay import constant, corrected, independent
from dlopt.tasks.user import TaskLoss
from dlopt.training import rng
from dlopt.training.builders import mup
from dlopt.training.builders.further import names_of
from dlopt.training.builders.rounding import round_updates
from dlopt.training.builders.speed import GRAPH_MODES
from dlopt.training.builders.workload import Workload, batch_size
from dlopt.training.clipping import Adaptive, ByValue, Unclipped

log = logging.getLogger(__name__)

LR_SCALES: Mapping[str, Callable[[float], float]] = {"linear": float, "sqrt": math.sqrt}
"""Of scale_lr: the factor of the learning rate, by the ratio of two batch sizes."""


def build_optimizer(workload: Workload) -> Optimizer:
    """Builds the optimizer over the model's parameter groups; scales its learning rate by the batch size (scale_lr)."""
    run_config, settings, module = workload.run_config, workload.run_config.settings, workload.module
    component, arguments = run_config.optimizer, dict(run_config.optimizer.arguments)
    if run_config.auto_lr:
        raise UserError("optimizer.lr=auto: only `dlopt train` runs a range test; set a number")
    base: Component | None = None
    if component.is_a(SAM):  # SAM uses the groups of its base, whose multipliers refer to the base's arguments
        base = arguments["base"]
        arguments = {**base.arguments, **({} if arguments.get("lr") is None else {"lr": arguments["lr"]})}
    if settings.scale_lr != "none":
        ratio = batch_size(run_config, workload.dataset.train) / settings.scale_lr_reference
        arguments["lr"] *= LR_SCALES[settings.scale_lr](ratio)
    component = component.partial(**(arguments if base is None else {"lr": None, "base": base.partial(**arguments)}))
    growth = workload.growth
    normalized: set[str] = set()  # weights whose decay decay=corrected corrects
    if run_config.decay.target is corrected and not (normalized := normalized_weights(module, workload.uses)):
        raise UserError(
            f"{run_config.decay.choice}: corrects the decay of weights before a normalization layer, of which "
            f"{run_config.model.choice} trains none; use decay=constant, or a model with normalization"
        )

    def build(factors: Mapping[str, Mapping[str, float]] | None = None) -> tuple[Optimizer, bool]:
        groups = parameter_groups(
            module,
            run_config.grouping,
            arguments,
            decay_norm_and_bias=settings.decay_norm_and_bias,
            normalized=normalized,
            uses=workload.uses,
            factors=factors,
        )
        fused = can_fuse(component, [p for group in groups for p in group["params"]])
        try:
            return component.build_as(Optimizer, params=groups, **({"fused": True} if fused else {})), fused
        except ValueError as error:  # third-party optimizers validate their arguments themselves
            raise UserError(f"{component.choice}: {error}") from None

    optimizer, fused = build()
    if not all("lr" in group for group in optimizer.param_groups):
        raise UserError(
            f"{component.choice}: the parameter groups of {type(optimizer).__qualname__} have no lr, which schedules "
            "set; pass defaults with lr to torch.optim.Optimizer"
        )
    if growth is not None:  # the factors depend on the optimizer, and the groups on the factors
        factors = mup.width_factors(
            module,
            optimizer,
            growth,
            run_config.init.arguments["base_width"],
            arguments,
            independent=run_config.decay.target is independent,
            inverse=run_config.decay_settings.width == "inverse",
        )
        optimizer, fused = build(factors)
    check_optimizer(workload.parallel, optimizer)
    _check_decay(workload, optimizer)
    if needs_whole_tensors(workload.parallel, optimizer):
        step_by_owners(optimizer)
    check_label_sampling(workload.parallel, optimizer, workload.loss, is_weighted=workload.weights is not None)
    if fused:
        match_state_layout(optimizer)
        if isinstance(optimizer, torch.optim.SGD):
            start_momentum(optimizer)
    if run_config.decay_settings.cautious:  # within the rounding of bf16 weights, which would hide small updates
        make_decay_cautious(optimizer)
    # After the hooks above, which may extend a loaded state.
    if workload.precision.name == "bf16_pure" and optimizer_traits(optimizer).evaluations == "once":
        round_updates(optimizer, stream(settings.seed, rng.ROUNDING))
    return optimizer


# In torch.optim, and dlopt.optim.adamw, which builds torch's.
_FUSED = {"cpu": ("SGD", "Adam", "AdamW", "adamw", "Adagrad"), "cuda": ("SGD", "Adam", "AdamW", "adamw")}


def can_fuse(component: Component, parameters: Sequence[Tensor]) -> bool:
    """Returns whether torch has a fused kernel for these parameters, which saves a small model 10 % of a step on a CPU.

    False if the config chooses an implementation. See `match_state_layout` for its precondition.
    """
    target, arguments = component.target, component.arguments
    if not component.takes("fused") or {"fused", "foreach"} & set(arguments):
        return False
    # For dampening, see `start_momentum`.
    if any(arguments.get(key) for key in ("cautious", "hyperball", "dampening")):
        return False
    devices = {p.device.type for p in parameters if not p.is_meta}
    fusable = [name for device in devices for name in _FUSED.get(device, ())]
    is_known = target.__module__.partition(".")[0] in ("torch", "dlopt") and target.__name__ in fusable
    is_plain = all(p.is_floating_point() and not is_sharded_tensor(p) for p in parameters)
    return len(devices) == 1 and is_known and is_plain


def match_state_layout(optimizer: Optimizer) -> None:
    """Gives optimizer states the memory layout (strides) of their parameters, after a state is loaded.

    A fused kernel iterates over the memory of parameter, gradient and state in parallel, and would pair the wrong
    elements if their strides differed: a loaded state may come from another mode. Gradients have the parameters' layout
    by autograd's contract, which the first update checks.
    """

    def match_layout(optimizer: Optimizer) -> None:
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                is_like = isinstance(value, Tensor) and value.shape == parameter.shape
                if is_like and not _same_strides(value, parameter):
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    is_checked = False

    def check_gradients(optimizer: Optimizer, args: object, kwargs: object) -> None:
        nonlocal is_checked
        if is_checked:  # not removed instead: torch fails if one of several hooks removes itself
            return
        is_checked = True
        for group in optimizer.param_groups:
            if not all(p.grad is None or _same_strides(p.grad, p) for p in group["params"]):
                group["fused"] = False

    optimizer.register_load_state_dict_post_hook(match_layout)
    optimizer.register_step_pre_hook(check_gradients)


def start_momentum(optimizer: torch.optim.SGD) -> None:
    """Starts every momentum of fused SGD at zero, now and after a state is loaded.

    torch creates it at a parameter's first gradient. Its fused kernel fails (2.15: TypeError) if others of the group
    have one already, as in models that skip layers at random. Zero gives the same first update unless there is
    dampening, which torch does not apply to the first update.
    """

    def start(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            if group["momentum"] != 0:
                buffers(optimizer, [p for p in group["params"] if p.requires_grad], "momentum_buffer")

    start(optimizer)
    optimizer.register_load_state_dict_post_hook(start)


def _same_strides(tensor: Tensor, parameter: Tensor) -> bool:
    return tensor.is_meta or tensor.stride() == parameter.stride()


def needs_whole_tensors(parallel: Mode, optimizer: Optimizer) -> bool:
    """Returns whether an update needs whole tensors, the mode shards them by rows, and owners can update them."""
    return parallel.sharding.is_by_rows and optimizer_traits(optimizer).scope == "tensor"


def check_optimizer(parallel: Mode, optimizer: Optimizer) -> None:
    """Raises `UserError` if an update needs, or may need, more of the model than one rank has."""
    if needs_whole_tensors(parallel, optimizer):
        return
    name, traits = f"parallel={parallel.name}: {type(optimizer).__name__}", optimizer_traits(optimizer)
    advice = "use parallel=ddp or an elementwise optimizer (sgd, adamw, ...)"
    missing = {"tensors": traits.scope != "element", "layers": traits.scope == "model"}
    if not missing.get(parallel.sharding.kind):
        return
    if is_unknown(traits):
        raise UserError(
            f"{name} does not say what its updates depend on, and each rank has a part of the model; {advice}, or, if "
            "each element is updated from its own gradients only, add to the class: "
            'traits = dlopt.optim.OptimizerTraits(scope="element")'
        )
    needs = "full tensors or the full model" if parallel.sharding.kind == "tensors" else "all layers"
    raise UserError(f"{name} needs {needs}, but each rank has a part of them; {advice}")


def _check_decay(workload: Workload, optimizer: Optimizer) -> None:
    """Raises `UserError` if the config changes a weight decay that is not, or may not be, decoupled.

    Warns of a change of no weight decay.
    """
    run_config, groups, name = workload.run_config, optimizer.param_groups, type(optimizer).__name__
    settings = run_config.decay_settings
    if settings.width != "none" and not any("weight_decay" in group for group in groups):
        raise UserError(
            f"decay.width={settings.width}: {name} has no weight decay; use decay.width=none, or another optimizer "
            "(adamw, muon, soap, ...)"
        )
    if run_config.decay.target is constant and not settings.cautious:
        return
    key = "decay.cautious=true" if settings.cautious else run_config.decay.choice
    traits = optimizer_traits(optimizer)
    if is_unknown(traits):
        raise UserError(
            f"{key}: {name} does not say whether its weight decay is decoupled; use decay=constant without "
            "decay.cautious, or, if an update subtracts lr * weight_decay * theta beside a step that does not depend "
            "on weight_decay, add to the class: traits = dlopt.optim.OptimizerTraits(decoupled_decay=True)"
        )
    if not traits.decoupled_decay or not all("weight_decay" in group for group in groups):
        raise UserError(
            f"{key}: needs an optimizer that subtracts lr * weight_decay * theta (decoupled weight decay), which "
            f"{name} with these keys does not; use decay=constant without decay.cautious, or another optimizer "
            "(adamw, lion, sgdw, muon, soap, ...)"
        )
    if workload.parallel.ranks.is_main and not any(group["weight_decay"] for group in groups):
        log.warning("%s: has no effect, because the weight decay is 0; set optimizer.weight_decay", key)


def check_label_sampling(parallel: Mode, optimizer: Optimizer, loss: nn.Module, *, is_weighted: bool = False) -> None:
    """Raises `UserError` if the optimizer needs labels drawn from the predictions, which the run cannot provide."""
    if not optimizer_traits(optimizer).samples_labels:
        return
    name = type(optimizer).__name__
    if parallel.ranks.processes > 1:
        raise UserError(
            f"parallel={parallel.name}: {name} draws labels from the predictions, and their gradients are not averaged "
            "over ranks; use parallel=single or another optimizer"
        )
    if isinstance(loss, TaskLoss):
        raise UserError(
            f"task={loss.task.path}: has no class probabilities, of which {name} draws labels; use another optimizer "
            "(sophia: optimizer.hessian=hutchinson)"
        )
    further = "data.weight" if is_weighted else ", ".join(names_of(loss))
    lacks = "labels drawn from the model do not have it; leave it out"
    obstacle = f"{further}: {lacks}" if further else sampling_obstacle(loss)
    if obstacle is not None:
        raise UserError(f"{obstacle}, or an optimizer that draws no labels (sophia: optimizer.hessian=hutchinson)")


def evaluates_once(workload: Workload, optimizer: Optimizer) -> bool:
    """Returns whether the optimizer evaluates the loss once per update. Raises `UserError`: a setting needs it."""
    if optimizer_traits(optimizer).evaluations == "once":
        return True
    name = f"{type(optimizer).__name__} evaluates the loss several times per update"
    precision, compile = workload.precision.name, workload.run_config.settings.compile
    if precision == "fp16":
        raise UserError(f"precision=fp16: {name}, which loss scaling does not support; use precision=bf16 or fp32")
    if precision == "bf16_pure":
        raise UserError(
            f"precision=bf16_pure: {name}, at weights that differ by less than bf16 resolves; "
            "use precision=bf16 or fp32"
        )
    if compile in GRAPH_MODES:
        raise UserError(
            f"compile={compile}: {name}, and its CUDA graphs overwrite the gradients of the previous one; "
            "use compile=max-autotune-no-cudagraphs or compile=true"
        )
    return False


def build_schedule(workload: Workload, optimizer: Optimizer, length: Length) -> Scheduler:
    run_config = workload.run_config
    factor = schedules.build(
        run_config.build_schedule, run_config.warmup, steps=length.horizon, steps_per_epoch=length.per_epoch
    )
    # Frozen parameters have no gradients. That must not affect the others, for example in norms over all layers.
    traits = optimizer_traits(optimizer)
    is_independent = run_config.clip.target in (Unclipped, ByValue, Adaptive) and traits.scope != "model"
    freezes = workload.parallel.ranks.processes == 1 and is_independent and traits.rests_at_zero_lr
    horizon = schedules.Horizon(0, length.horizon, length.per_epoch)
    decay = run_config.decay.build(horizon=horizon)
    ratio = LR_SCALES.get(run_config.settings.scale_lr)
    scale = None if ratio is None or not length.grows else lambda t: ratio(length.count(t))
    return Scheduler(optimizer, factor, freezes=freezes, decay=decay, scale=scale)


def snapshot_names(schedule: Scheduler) -> Callable[[int], str | None]:
    """Returns a function from the number of updates done to the name of the snapshot to keep after them, or None.

    A snapshot is a checkpoint at the end of a cycle of the schedule (Huang et al. 2017, "Snapshot Ensembles").
    """
    ended_cycle = schedule.ended_cycle
    if ended_cycle is None:
        raise UserError(
            "checkpoint.at_restarts=true: this schedule has no restarts; "
            "use schedule=cosine_restarts or schedule=cosine_warmup_restarts"
        )

    return lambda step: None if (cycle := ended_cycle(step - 1)) is None else f"restart-{cycle}"
