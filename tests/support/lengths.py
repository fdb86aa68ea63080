"""Lengths of runs whose batch does not grow."""

from dlopt.basics.length import BatchCount, Length, SampleCount, UpdateCount


def constant(updates: int, per_epoch: int, horizon: int | None = None) -> Length:
    """Returns the length of a run of batches of 10 samples, whose schedule ends with it unless `horizon` is set."""
    end = BatchCount(updates if horizon is None else horizon)
    return Length(UpdateCount(updates), end, BatchCount(per_epoch), SampleCount(10), SampleCount(10 * per_epoch))
