"""Builds the step of a config, and its update with everything around it."""

from collections.abc import Callable, Sequence

from torch.optim import Optimizer

from dlopt.basics.errors import UserError
from dlopt.basics.random import stream
from dlopt.machine.cuda_graphs import Recorder
from dlopt.metrics.sums import MetricSum
from dlopt.optim.traits import optimizer_traits
from dlopt.schedules import Scheduler
from dlopt.training import graphed_update, rng
from dlopt.training.around import surround
from dlopt.training.averaging import WeightAverage
from dlopt.training.builders.optimizer import evaluates_once
from dlopt.training.builders.workload import Workload
from dlopt.training.clipping import Unclipped
from dlopt.training.closure import ClosureStep
from dlopt.training.graphed_update import GraphedUpdate
from dlopt.training.micro_loss import Network
from dlopt.training.nonfinite import Diverged
from dlopt.training.step import Observer, Step, StepSettings, UpdateFunction
from dlopt.training.stopping import Stopping, WeightStopping


def build_step(
    workload: Workload,
    network: Network,
    optimizer: Optimizer,
    schedule: Scheduler,
    *,
    metrics: MetricSum,
    average: WeightAverage | None,
    checks: bool,
    observers: Sequence[Observer] = (),
) -> Step:
    """Builds the step. `checks`: false disables the non-finite check. Raises `UserError`."""
    settings, clip = workload.run_config.settings, workload.run_config.clip
    if optimizer_traits(optimizer).ignores_clipping and clip.target is not Unclipped:
        raise UserError(
            f"{clip.choice}: {type(optimizer).__name__} computes the gradient "
            "of its step itself, which would not be clipped; use clip=none or another optimizer"
        )
    built = clip.build(model=workload.module, uses=workload.uses)
    clip.require_call(built, "clip(parameters, norm)")
    check_now = workload.device.type == "cpu" or settings.check == "step" or settings.on_divergence == "skip"
    kind = Step if evaluates_once(workload, optimizer) else ClosureStep
    return kind(
        network,
        optimizer,
        schedule,
        workload.parallel,
        StepSettings(
            accumulate=settings.micro_batches,
            seed=stream(settings.augmentation_seed, rng.DROPOUT),
            check_now=checks and check_now,
            halve_on_out_of_memory=settings.on_out_of_memory == "halve",
            grows=settings.batch_growth is not None,
        ),
        precision=workload.precision,
        metrics=metrics,
        clip=built,
        synchronize_buffers=workload.placed.synchronize_buffers,
        average=None if average is None else average.update,
        observers=observers,
    )


def build_update_function(
    workload: Workload,
    step: Step,
    *,
    average: WeightAverage | None,
    stopping: Stopping,
    skip: Callable[[Diverged], bool] | None,
    observers: Sequence[Observer],
    batch_size: int,
) -> tuple[UpdateFunction, str | None]:
    """Returns what runs the updates of a step, and why it replays no CUDA graph (None: it does). Raises `UserError`."""
    settings, network = workload.run_config.settings, workload.network
    reason = graphed_update.obstacle(
        step,
        [workload.loss, step.clip],
        observed=bool(observers or settings.diagnostics or settings.profile),  # only rank 0 has the observers
        compile=False if workload.compile_obstacle else settings.compile,
    )
    if reason is None and network.further is not None:
        reason = "the static batch of a graph has no further arguments of a loss, such as the outputs of a teacher"
    if reason is None and network.task_loss is not None:
        reason = f"task={workload.task.name} may have control flow on the host"
    if reason is not None and settings.cuda_graphs is True:
        raise UserError(f"cuda_graphs=true: {reason}; use cuda_graphs=auto")
    update: UpdateFunction = step.update
    if reason is None and settings.cuda_graphs is not False:
        logs, is_steady = settings.log_every_steps is not None, average is not None and average.is_steady
        update = GraphedUpdate(step, Recorder(), batch_size, log_norm=logs, averages=is_steady)
    after_change = stopping.after_change if isinstance(stopping, WeightStopping) else None
    return surround(step, update, after_change=after_change, skip=skip, observers=observers), reason
