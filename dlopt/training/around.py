"""Puts around an update what only some runs need: observers, skipped updates, stopping rules."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from dlopt.data.batches import Batch
from dlopt.training.nonfinite import Diverged
from dlopt.training.saved_buffers import SavedBuffers
from dlopt.training.step import Observer, Step, UpdateFunction, UpdateResult


def surround(
    step: Step,
    update: UpdateFunction,
    *,
    after_change: Callable[[], None] | None = None,
    skip: Callable[[Diverged], bool] | None = None,
    observers: Sequence[Observer] = (),
) -> UpdateFunction:
    """Returns `update` of a step with everything around it that the run needs.

    Args:
        update: `step.update`, or its replay from a CUDA graph.
        after_change: called after every update that has changed the weights (stopping rules).
        skip: decides whether to skip an update whose loss or gradient is not finite; None to raise the error. A skipped
            update has no loss, but counts: schedule, data and random numbers depend on the update's number only.
    """
    if after_change is None and skip is None and not observers:
        return update
    scaler = step.scaler
    buffers = None if skip is None else SavedBuffers(step.module)

    def surrounded(batch: Batch, number: int, *, log_norm: bool = False) -> UpdateResult:
        with ExitStack() as stack:
            # 1. Observe.
            for context in [each.around_update(step, batch.inputs, batch.targets, number) for each in observers]:
                if context is not None:
                    stack.enter_context(context)

            # 2. Save what the forward pass changes before anyone knows that the update will be skipped: the running
            #    statistics. Weights are unchanged until the check has passed.
            if buffers is not None:
                buffers.save()

            # 3. Update. The scaler skips some, and reduces its scale: reading the scale waits for the device.
            former = 0.0 if after_change is None or scaler is None else scaler.get_scale()
            try:
                result = update(batch, number, log_norm=log_norm)
                if after_change is not None and (scaler is None or scaler.get_scale() >= former):
                    after_change()
                return result

            # 4. Skip an update with non-finite values.
            except Diverged as error:
                if buffers is None or skip is None or not error.before_update or not skip(error):
                    raise
            buffers.restore()
            step.advance()
            return UpdateResult(None, [])

    return surrounded
