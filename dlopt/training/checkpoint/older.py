"""What checkpoints of earlier versions do not say, added when they are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.basics.length import BatchCount, Length, SampleCount, UpdateCount
from dlopt.tracking.metrics import read_metrics


def with_length(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the content of the checkpoint `path` with the length of its run, as far as it is known.

    Of its samples nothing is known (0), nor how its batch grew, and without metrics.jsonl nothing of the batches of an
    epoch, unless it ended one (0).
    """
    progress = state["progress"]
    if "length" in progress:
        return dict(state)
    per_epoch = progress.get("steps_per_epoch") or _batches_per_epoch(state, path.parent.parent)
    horizon, unknown = BatchCount(progress["horizon"]), SampleCount(0)
    length = Length(UpdateCount(progress["step"]), horizon, BatchCount(per_epoch), unknown, unknown)
    return {**state, "progress": {**progress, "length": length.state_dict()}}


def _batches_per_epoch(state: Mapping[str, Any], folder: Path) -> int:
    progress, has_steps = state["progress"], state["config"].get("steps") is not None
    for line in read_metrics(folder):
        epoch, step = line.get("epoch"), line.get("step")
        is_whole = not has_steps or (type(step) is int and step < progress["step"])  # steps=N may have ended an epoch
        if is_whole and type(epoch) is type(step) is int and epoch > 0 and step % epoch == 0:
            return step // epoch
    return 0
