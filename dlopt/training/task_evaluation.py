"""Evaluation of a task of the user's own: the mean loss, and the values that it computes itself."""

import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dlopt.basics.errors import RunError
from dlopt.basics.random import stream
from dlopt.data.samples import Samples
from dlopt.metrics.names import by_column
from dlopt.metrics.sums import MetricSum
from dlopt.models.layers import evaluation_mode
from dlopt.tasks.draws import Draws
from dlopt.tasks.user import Batch, OwnTask, TaskErrors, TaskLoss
from dlopt.training.builders.batches import evaluation_batches
from dlopt.training.builders.workload import Workload
from dlopt.training.rng import EVALUATION


def evaluate_task(
    workload: Workload,
    task: OwnTask,
    batches: "TaskBatches",
    split: Literal["val", "test"],
    interruption: object = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, float] | None:
    """Returns the mean loss and the task's values of a split by column; None if interrupted. Raises `RunError`.

    Every process evaluates all samples: the results are equal, and no value has to be put together from shards.
    """
    assert task.user is not None
    seed = stream(workload.run_config.settings.augmentation_seed, EVALUATION)
    draws = Draws.of_update(workload.device, seed, batches.samples, workload.precision.dtype)
    is_whole = workload.parallel.sharding.kind == "replicated"
    model = workload.module if is_whole else workload.placed.model
    task_loss = workload.precision.autocast_parts(TaskLoss(model, task))
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
        with TaskErrors(task, "evaluate"), torch.no_grad():
            draws, model = draws.at(slice(0, batches.samples)), workload.precision.autocast(model)
            values = task.user.evaluate(model, batches, draws, split)
    return metrics.means(split) | by_column(split, _checked(task, values))


class TaskBatches:
    """All batches of a split, as often as they are iterated. `samples`: their number."""

    def __init__(self, workload: Workload, task: OwnTask, samples: Samples) -> None:
        self.samples = len(samples)
        self._task = task
        self._dtype = workload.precision.dtype
        self._batches = evaluation_batches(workload, samples, shared=False)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self.counted())

    def counted(self) -> Iterator[tuple[int, Batch]]:
        """Yields each batch with its number of samples."""
        for inputs, targets in self._batches.epoch(0):
            yield len(targets), self._task.batch(inputs, targets, self._dtype)


def _checked(task: OwnTask, values: Any) -> dict[str, float]:
    """Returns the values of an evaluation as numbers. Raises `RunError`."""
    assert task.user is not None
    where, names = f"task={task.path}: evaluate", [*task.user.values]
    if not isinstance(values, Mapping) or sorted(map(str, values)) != sorted(names):
        found = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
        raise RunError(f"{where} returned {found or 'nothing'}; must return {', '.join(names) or 'nothing'} (`values`)")
    checked = {}
    for name, value in values.items():
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
            raise RunError(f"{where}: {name} must be a number, not {type(value).__name__}{shape}")
        checked[name] = float(number)
    return checked
