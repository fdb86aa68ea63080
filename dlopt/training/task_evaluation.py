"""Evaluation of a task of the user's own: the mean loss, and the values that it computes itself."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch

from dlopt.basics.random import stream
from dlopt.data.samples import Samples
from dlopt.metrics.names import by_column
from dlopt.metrics.sums import MetricSum
from dlopt.models.layers import evaluation_mode
from dlopt.tasks.draws import Draws
from dlopt.tasks.user import Batch, TaskErrors
from dlopt.training.builders.batches import evaluation_batches
from dlopt.training.builders.workload import Workload
from dlopt.training.rng import EVALUATION


def evaluate_task(
    workload: Workload,
    batches: "TaskBatches",
    split: Literal["val", "test"],
    interruption: object = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, float] | None:
    """Returns the mean loss and the task's values of a split by column; None if interrupted. Raises `RunError`.

    Every process evaluates all samples: the results are equal, and no value has to be put together from shards.
    """
    task, seed = workload.task, stream(workload.run_config.settings.augmentation_seed, EVALUATION)
    draws = Draws.of_update(workload.device, seed, batches.samples, workload.precision.dtype)
    is_whole = workload.parallel.sharding.kind == "replicated"
    model = workload.module if is_whole else workload.placed.model
    task_loss = workload.precision.autocast_parts(task.own_loss(model))
    metrics, start = MetricSum(task), 0
    with evaluation_mode(workload.module):
        for done, (count, batch) in enumerate(batches.counted(), 1):
            positions = slice(start, start + count)
            start = positions.stop
            # With gradients, unlike other evaluations: a loss may contain derivatives of the model by its inputs.
            with TaskErrors(task, "the loss"), torch.set_grad_enabled(is_whole):
                parts = task_loss(batch, draws.at(positions))
            loss = torch.stack([*parts.values()]).sum().detach()
            metrics.add(metrics.keep_parts(loss, {}, count))
            if on_batch is not None:
                on_batch(done, len(batches))
            if interruption:
                return None
        model = workload.precision.autocast(model)
        values = task.own_values(model, batches, draws.at(slice(0, batches.samples)), split)
    return metrics.means(split) | by_column(split, values)


class TaskBatches:
    """All batches of a split, as often as they are iterated. `samples`: their number."""

    def __init__(self, workload: Workload, samples: Samples) -> None:
        self.samples = len(samples)
        self._task, self._dtype = workload.task, workload.precision.dtype
        self._batches = evaluation_batches(workload, samples, shared=False)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self.counted())

    def counted(self) -> Iterator[tuple[int, Batch]]:
        """Yields each batch with its number of samples."""
        for inputs, targets in self._batches.epoch(0):
            yield len(targets), self._task.batch(inputs, targets, self._dtype)
