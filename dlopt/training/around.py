"""Functions around an update, for the runs that need them: `surround` puts them around `Step.update`."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from dlopt.data.batches import Batch
from dlopt.training.nonfinite import Diverged
from dlopt.training.saved_buffers import SavedBuffers
from dlopt.training.step import Observer, Step, Update, UpdateRecord


def surround(
    step: Step,
    update: Update,
    *,
    after_change: Callable[[], None] | None = None,
    skip: Callable[[Diverged], bool] | None = None,
    observers: Sequence[Observer] = (),
) -> Update:
    """Returns `update` of a step with everything around it that the run needs.

    Args:
        update: `step.update`, or its replay from a CUDA graph.
        after_change: called after every update that has changed the weights (stopping rules).
        skip: decides whether to skip an update with non-finite gradients; None to raise the error.
    """
    if after_change is not None:
        update = reporting_changes(update, step, after_change)
    if skip is not None:
        update = skipping(update, step, skip)
    return observed(update, step, observers) if observers else update


def reporting_changes(update: Update, step: Step, after_change: Callable[[], None]) -> Update:
    """Calls `after_change` after `update`, unless the gradient scaler has skipped it."""

    def reported(batch: Batch, number: int, *, log_norm: bool = False) -> UpdateRecord:
        # The scaler reduces its scale when it skips an update. Reading the scale waits for the device.
        former = None if step.scaler is None else step.scaler.get_scale()
        record = update(batch, number, log_norm=log_norm)
        if step.scaler is None or former is None or step.scaler.get_scale() >= former:
            after_change()
        return record

    return reported


def skipping(update: Update, step: Step, skip: Callable[[Diverged], bool]) -> Update:
    """Skips an update whose loss or gradient is not finite, if `skip` permits it: its record has no loss.

    A skipped update counts: schedule, data and random numbers depend on the update's number only.
    """
    buffers = SavedBuffers(step.module)

    def skipped(batch: Batch, number: int, *, log_norm: bool = False) -> UpdateRecord:
        # The forward pass changes running statistics before anyone can know that the update will be skipped. Weights
        # need no copy: they are unchanged until the check has passed.
        buffers.save()
        try:
            return update(batch, number, log_norm=log_norm)
        except Diverged as error:
            if not error.before_update or not skip(error):
                raise
        buffers.restore()
        step.advance()
        return UpdateRecord(None, [])

    return skipped


def observed(update: Update, step: Step, observers: Sequence[Observer]) -> Update:
    """Runs `update` within the contexts of the observers."""

    def watched(batch: Batch, number: int, *, log_norm: bool = False) -> UpdateRecord:
        contexts = [observer.around_update(step, batch.inputs, batch.targets, number) for observer in observers]
        with ExitStack() as stack:
            for context in contexts:
                if context is not None:
                    stack.enter_context(context)
            return update(batch, number, log_norm=log_norm)

    return watched
