"""Finds the task of a run: from its data, from its model or loss, or from a checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dlopt.tasks.classification import Classification
from dlopt.tasks.labels import MultiLabel
from dlopt.tasks.reconstruction import Reconstruction
from dlopt.tasks.regression import Regression
from dlopt.tasks.task import Task
from dlopt.tasks.text import NextToken
from dlopt.tasks.user import OwnTask

KINDS: tuple[type[Task], ...] = (Classification, MultiLabel, Regression, NextToken, Reconstruction, OwnTask)


def of_labels(classes: int | None, targets: Tensor, white: float) -> Task:
    """Returns the task of data with these targets: see `dlopt.data.samples.Samples`. `classes`: None for numbers."""
    if classes is None:
        return Regression(1 if targets.ndim == 1 else targets.shape[1], white)
    # A float target marks each class that the sample has.
    return MultiLabel(classes, white) if targets.is_floating_point() else Classification(classes, white)


def auto() -> None:
    """Returns None: the data, the loss or the model say what the task is (task=auto)."""


def chosen(task: Task, shape: tuple[int, ...], *components: tuple[Callable[..., Any], str]) -> Task:
    """Returns the task that one of the components (callable, choice) sets, for samples of `shape`; else `task`.

    A class sets its task by an attribute `task`, a class of tasks, or by `reconstructs = True`. Raises `UserError`.
    """
    for target, choice in components:
        kind = Reconstruction if getattr(target, "reconstructs", False) else getattr(target, "task", None)
        if isinstance(kind, type) and issubclass(kind, Task):
            return kind.instead_of(task, shape, choice)
    return task


def restored(saved: Mapping[str, Any]) -> Task:
    """Returns the task of a checkpoint, see `Task.saved`."""
    return {each.kind: each for each in KINDS}[saved["kind"]].of_fields(saved)
