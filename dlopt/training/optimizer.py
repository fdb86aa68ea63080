"""Optimizer, schedule and step of an experiment."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlopt import schedules
from dlopt.config.experiment import Experiment
from dlopt.config.schema import Component
from dlopt.errors import UserError
from dlopt.graphs import CudaRecorder
from dlopt.parallel.mode import Mode
from dlopt.parallel.shards import is_sharded_tensor
from dlopt.parameters import parameter_groups
from dlopt.random import stream
from dlopt.schedules import Scheduler
from dlopt.training import cuda_graphs, rng
from dlopt.training.averaging import ExponentialAverage
from dlopt.training.build import Workload
from dlopt.training.cuda_graphs import Capture, GraphedStep
from dlopt.training.nonfinite import Diverged
from dlopt.training.progress import Length
from dlopt.training.step import Network, Observer, Step, StepSettings
from dlopt.training.stopping import Stopping


def optimizer_of(workload: Workload) -> torch.optim.Optimizer:
    """The optimizer over the model's parameter groups; its learning rate follows the batch size where that is asked."""
    experiment, settings = workload.experiment, workload.experiment.settings
    component = experiment.optimizer
    if experiment.auto_lr:
        raise UserError("optimizer.lr=auto: only `dlopt train` looks for the learning rate; type a number here")
    if settings.scale_lr != "none":
        component = component.partial(lr=component.arguments["lr"] * _lr_scale(experiment, len(workload.dataset.train)))
    groups = parameter_groups(
        workload.module, experiment.grouping, component.arguments, decay_norm_and_bias=settings.decay_norm_and_bias
    )
    fused = may_fuse(component, [p for group in groups for p in group["params"]])
    try:
        optimizer: torch.optim.Optimizer = component.partial(**({"fused": True} if fused else {})).build(params=groups)
    except ValueError as error:  # a class that is not ours has a range of its own, or takes one group only
        raise UserError(f"optimizer={component.target.__name__}: {error}") from None
    check_optimizer(workload.parallel, optimizer)
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
    return len(devices) == 1 and target.__name__ in fusing and not any(map(is_sharded_tensor, parameters))


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


def check_optimizer(parallel: Mode, optimizer: torch.optim.Optimizer) -> None:
    """Raises `UserError` where an update needs more of the model at once than a rank has of it."""
    kind = type(optimizer)
    name = f"parallel={parallel.name}: {kind.__name__}"
    others = "use parallel=ddp or an optimizer that works element by element (sgd, adamw, ...)"
    is_torchs = kind.__module__.startswith("torch.")
    alone = getattr(kind, "elementwise", not (is_torchs and kind.__name__ in _NOT_ELEMENTWISE))
    if parallel.sharding == "tensors" and not alone:
        raise UserError(f"{name} needs whole tensors or the whole model for an update, and ranks have parts; {others}")
    many = getattr(optimizer, "evaluations", "many" if isinstance(optimizer, torch.optim.LBFGS) else "once") == "many"
    if parallel.sharding == "layers" and many:
        raise UserError(f"{name} looks at all layers at once for an update, and each rank has some of them; {others}")


def _lr_scale(experiment: Experiment, count: int) -> float:
    size = experiment.data_settings.batch_size
    ratio = (count if size == "full" else size) / experiment.settings.scale_lr_reference
    return math.sqrt(ratio) if experiment.settings.scale_lr == "sqrt" else ratio


def evaluations(workload: Workload, optimizer: torch.optim.Optimizer) -> str:
    """Whether the optimizer evaluates the loss once or many times per update: it says so, or it is torch's L-BFGS."""
    many = isinstance(optimizer, torch.optim.LBFGS)
    declared: str = getattr(optimizer, "evaluations", "many" if many else "once")
    if declared == "many" and workload.precision.name == "fp16":
        raise UserError(
            f"precision=fp16: {type(optimizer).__name__} evaluates the loss several times per update, "
            "which loss scaling cannot follow; use precision=bf16 or fp32"
        )
    return declared


def build_schedule(workload: Workload, optimizer: Optimizer, length: Length) -> Scheduler:
    experiment = workload.experiment
    factor = schedules.build(
        experiment.schedule.build, experiment.warmup, steps=length.horizon, steps_per_epoch=length.steps_per_epoch
    )
    return Scheduler(optimizer, factor, freezes=workload.parallel.processes == 1)


def build_step(
    workload: Workload,
    network: Network,
    optimizer: Optimizer,
    schedule: Scheduler,
    *,
    average: ExponentialAverage | None,
    stopping: Stopping,
    skip: Callable[[Diverged], bool] | None,
    observers: Sequence[Observer],
    checks: bool,
    batch_size: int,
) -> tuple[Step, str | None]:
    """Returns the step, and why it is not replayed from a CUDA graph; None: it is. Raises `UserError`."""
    settings, mode, device = workload.experiment.settings, workload.parallel, workload.device
    halves = settings.on_out_of_memory == "halve"
    if halves and mode.processes > 1:
        raise UserError(
            f"on_out_of_memory=halve: not with {mode.processes} processes, which would have to cut their "
            "batches at the same time; set accumulate instead"
        )
    check_now = device.type == "cpu" or settings.check == "step" or settings.on_divergence == "skip"
    step_settings = StepSettings(
        accumulate=settings.accumulate,
        seed=stream(settings.augmentation_seed, rng.DROPOUT),
        evaluates_once=evaluations(workload, optimizer) == "once",
        check_now=checks and check_now,
        halve_on_out_of_memory=halves,
    )
    observed = bool(settings.diagnostics or settings.profile)
    reason = cuda_graphs.obstacle(
        workload.module, optimizer, schedule, mode, step_settings, precision=workload.precision, observed=observed
    )
    if reason is not None and settings.cuda_graphs is True:
        raise UserError(f"cuda_graphs=true: {reason}; use cuda_graphs=auto")
    average_weights = None if average is None else average.update
    synchronize = mode.buffer_synchronization(workload.module)
    after = [each for each in (synchronize, average_weights, getattr(stopping, "after_update", None)) if each]
    arguments = network, optimizer, schedule, mode, step_settings
    clip = workload.experiment.clip.build(model=workload.module)
    common = {"precision": workload.precision, "clip": clip, "after": after, "skip": skip, "observers": observers}
    if reason is not None or settings.cuda_graphs is False:
        return Step(*arguments, **common), reason
    inside = [average_weights] if average_weights else []
    capture = Capture(CudaRecorder(), batch_size, settings.log_every_steps is not None, inside)
    return GraphedStep(*arguments, capture=capture, **common), None


def snapshot_names(schedule: Scheduler) -> Callable[[int], str | None]:
    """Returns which numbers of updates end a cycle of the schedule, by the name of the checkpoint that is kept there
    (Huang et al. 2017, "Snapshot Ensembles")."""
    ended = schedule.ended_cycle
    if ended is None:
        raise UserError(
            "checkpoint.at_restarts=true: this schedule has no restarts; "
            "use schedule=cosine_restarts or schedule=cosine_warmup_restarts"
        )

    def snapshot(step: int) -> str | None:
        cycle = ended(step - 1)
        return None if cycle is None else f"restart-{cycle}"

    return snapshot
