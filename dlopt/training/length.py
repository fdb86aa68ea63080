"""The length of a run from its settings, its data and the checkpoint from which it continues, and what it allows."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dlopt import schedules
from dlopt.basics.errors import StateError, UserError
from dlopt.basics.length import NO_BATCHES, NO_UPDATES, BatchCount, Length, SampleCount, UpdateCount, advanced
from dlopt.config.parameters import show
from dlopt.config.run_config import RunConfig, Settings
from dlopt.config.settings import Growth
from dlopt.data.batches import Batches
from dlopt.schedules.horizon import whole
from dlopt.training.checkpoint.content import Checkpoint

_ZERO = 1e-12  # learning-rate factors below are rounding errors of 0


def length_of_run(settings: Settings, batches: Batches, checkpoint: Checkpoint | None) -> Length:
    """Computes the length of a run with these training batches, resumed from a checkpoint or new.

    Raises `UserError` for a batch that grows beyond an epoch.
    """
    of_data = Length(
        NO_UPDATES, NO_BATCHES, BatchCount(len(batches)), SampleCount(batches.batch_size),
        SampleCount(batches.count),
    )  # fmt: skip
    if settings.batch_growth is not None:
        of_data = _growing(of_data, settings.batch_growth, checkpoint)
    return with_ends(of_data, settings, checkpoint)


def with_ends(length: Length, settings: Settings, checkpoint: Checkpoint | None) -> Length:
    """Returns the length with the ends that the settings request, of the run and of its schedule.

    A run that is resumed with more epochs keeps its schedule, unless `schedule_epochs` is set.
    """
    if checkpoint is not None:
        position = checkpoint.epoch * length.per_epoch + checkpoint.position
        skipped = BatchCount(0 if length.grows else position - checkpoint.step)
        length = replace(length, skipped=skipped, done=checkpoint.step)
    if settings.steps is not None:
        updates = UpdateCount(settings.steps)
        end = length.batches(updates)
    else:
        end = BatchCount(settings.whole_epochs * length.per_epoch)
        is_ahead = end >= length.origin[1]
        updates = length.updates_before(end) if is_ahead else UpdateCount(length.done - 1)  # refused later
    if settings.schedule_epochs is not None:
        end = BatchCount(round(settings.schedule_epochs * length.per_epoch))
    elif checkpoint is not None:
        end = checkpoint.length.horizon
    return replace(length, updates=updates, horizon=end)


def _growing(length: Length, growth: Growth, checkpoint: Checkpoint | None) -> Length:
    """Returns the length with updates that take more batches from each milestone on. Raises `UserError`."""
    counts = tuple(number // growth.micro_batches[0] for number in growth.micro_batches)
    if counts[-1] > length.per_epoch:
        raise UserError(
            f"accumulate.micro_batches={show(growth.micro_batches)}: a batch of {counts[-1] * length.batch} "
            f"samples is larger than an epoch ({length.epoch}); use fewer micro-batches or a smaller data.batch_size"
        )

    def counted_from(origin: tuple[UpdateCount, BatchCount]) -> Length:
        counted = replace(length, counts=counts, origin=origin)
        return replace(counted, starts=(0, *(_after_updates if growth.steps else _milestones)(counted, growth)))

    from_start = counted_from(length.origin)
    if checkpoint is None:
        return from_start
    # After steps=N within an epoch, a resumed run continues with the next one: it has skipped the batches in between.
    position = BatchCount(checkpoint.epoch * length.per_epoch + checkpoint.position)
    return counted_from((checkpoint.step, position)) if from_start.batches(checkpoint.step) != position else from_start


def _milestones(length: Length, growth: Growth) -> Iterator[int]:
    """Yields t of the first update at or after each milestone in epochs or samples."""
    for epochs in growth.epochs or ():
        yield math.ceil(whole(epochs * length.per_epoch))
    for samples in growth.samples or ():
        whole_epochs, rest = divmod(samples, length.epoch)
        yield whole_epochs * length.per_epoch + math.ceil(rest / length.batch)


def _after_updates(length: Length, growth: Growth) -> Iterator[int]:
    """Yields t of each milestone in updates, given t after the updates done; that t for milestones before them."""
    updates, t = map(int, length.origin)
    for milestone, count in zip(growth.steps or (), length.counts, strict=False):  # `count`: before the milestone
        if milestone > updates:
            t, updates = advanced(t, milestone - updates, count, length.per_epoch), milestone
        yield t


def check_horizon(
    run_config: RunConfig, length: Length, checkpoint: Checkpoint, typed: Sequence[str] | None = None
) -> str | None:
    """Compares the length of a run resumed from `checkpoint` with its schedule's; returns a line if they differ.

    Raises `UserError` if the checkpoint is later than the end, or if all updates after the end of the schedule would
    have learning rate 0, with the command that stretches it if the command line is `typed`. Whoever sets
    `schedule_epochs` has chosen the horizon.
    """
    settings, steps, horizon = run_config.settings, length.batches(length.updates), length.horizon
    key = f"epochs={settings.epochs}" if settings.steps is None else f"steps={settings.steps}"
    if length.updates < checkpoint.step:
        done = f"{length.epochs_of(length.batches(checkpoint.step)):.6g} epochs"
        done = done if settings.steps is None else str(checkpoint.step)
        raise StateError(f"{key}: this run has already done {done}; set a larger number, or train in another folder")
    if settings.schedule_epochs is not None or steps == horizon or length.updates <= checkpoint.step:
        return None
    factor = schedules.build(
        run_config.build_schedule, run_config.warmup, steps=horizon, steps_per_epoch=length.per_epoch
    )
    if factor(horizon + 1) != factor(horizon):  # the schedule has no end
        return None
    end, schedule_end = (f"{length.epochs_of(count):.6g}" for count in (steps, horizon))
    final = factor(horizon)
    if steps < horizon:
        last = factor(steps - 1)
        line = f"{key}: the schedule ends at epoch {schedule_end}, the run at epoch {end} with {last:.3g} of the peak "
        return None if last == final else f"{line}learning rate; to shorten the schedule, set schedule_epochs={end}"
    later = [*range(horizon, steps, length.per_epoch), steps - 1]
    if all(factor(step) < _ZERO for step in later):
        words = [] if typed is None else ["dlopt", "train", *typed, f"schedule_epochs={end}"]
        command = f": {shlex.join(words)}" if words else ""
        raise UserError(
            f"{key}: the schedule of this run ends at epoch {schedule_end} with learning rate 0, so later epochs would "
            f"not change the weights; set schedule_epochs={end} to stretch the schedule, or "
            f"schedule_epochs={schedule_end} to train on at 0{command}"
        )
    line = f"{key}: the schedule ends at epoch {schedule_end}; later epochs have {final:.3g} of the peak learning rate"
    return None if final == 1.0 else f"{line}; to stretch the schedule, set schedule_epochs={end}"


def check_lengthened(run_config: RunConfig, checkpoint: Checkpoint) -> None:
    """Like `check_horizon`, before the data is read; not for a batch that grows, which the data may refuse."""
    saved = checkpoint.length
    if run_config.settings.batch_growth is None and saved.per_epoch:
        check_horizon(run_config, with_ends(saved, run_config.settings, checkpoint), checkpoint)


def evaluation_interval(settings: Settings, length: Length) -> int | None:
    """Returns the updates between evaluations within an epoch. Raises `UserError` if none would be within one."""
    every, shortest = settings.evaluate.every_steps, min(int(length.per_epoch), int(length.updates))
    if every is not None and every >= shortest:
        whole = "epoch" if shortest == length.per_epoch else "run"
        raise UserError(
            f"evaluate.every_steps={every}: the {whole} has only {shortest} updates, and is evaluated at its end; "
            "set a smaller number, or evaluate.every_steps=null"
        )
    return every
