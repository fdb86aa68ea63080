"""Fits samples of other data to the data that a model was trained on: columns, class numbers, kinds of targets."""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.checks import LEFT_OUT, WARNING, form, listed
from dlopt.data.samples import Dataset, InMemory, Samples
from dlopt.data.table_rows import TableRows
from dlopt.data.windows import Windows
from dlopt.tasks.text import NextToken

NOT_ENCODED = "the model was trained on columns of numbers without gaps; these have gaps, texts or dates"


def as_trained(samples: Samples, source: Dataset, trained: Dataset) -> Samples:
    """Returns samples of `source` with the columns and the class numbers of the data `trained`.

    Classes and columns are matched by name. Raises `UserError` if they are not those of the same task.
    """
    if source.layout != trained.layout:
        mine, other = (each.layout or "one input and one label" for each in (source, trained))
        raise UserError(f"its items have {mine}, those of the training data {other}")
    if isinstance(samples, Windows) != isinstance(trained.train, Windows):
        kinds = ["text" if isinstance(each, Windows) else "no text" for each in (samples, trained.train)]
        raise UserError(f"is {kinds[0]}, the training data are {kinds[1]}")
    if isinstance(samples, Windows):
        _check_tokens(source, trained)
        return samples
    samples = _encoded(samples, trained)
    targets = _targets(samples.targets, source, trained)
    if targets is samples.targets:
        return samples
    fitted = copy(samples)
    fitted.targets = targets  # type: ignore[misc]
    return fitted


def _check_tokens(source: Dataset, trained: Dataset) -> None:
    own, task = source.task, trained.task
    if not isinstance(own, NextToken) or not isinstance(task, NextToken):  # a task of the user's own reads anything
        return
    if (own.outputs, own.unit) != (task.outputs, task.unit):
        raise UserError(
            f"has {own.unit}s of a vocabulary of {own.outputs:,}, the training data {task.unit}s of {task.outputs:,}"
        )


def _encoded(samples: Samples, dataset: Dataset) -> Samples:
    """Returns rows of a table with the features of the training data."""
    if isinstance(samples, TableRows):
        if dataset.columns is None or dataset.columns.encoding is None:
            raise UserError(NOT_ENCODED)
        return InMemory(torch.from_numpy(dataset.columns.encoding.apply(samples.columns)), samples.targets)
    return samples


def _targets(targets: Tensor, source: Dataset, trained: Dataset) -> Tensor:
    """Returns the targets with the numbers that the classes have in the training data."""
    kinds = [_kind(each) for each in (source, trained)]
    if kinds[0] != kinds[1]:
        raise UserError(f"its targets are {kinds[0]}, those of the training data {kinds[1]}")
    names, known = source.classes, trained.classes
    if names is None or known is None or names == known:
        return targets
    is_used = targets.any(0) if targets.ndim == 2 else torch.bincount(targets, minlength=len(names)) > 0
    unknown = [name for name, used in zip(names, is_used.tolist(), strict=True) if used and name not in known]
    if unknown:
        raise UserError(f"has the classes {listed(unknown)}, which the training data lack: {listed([*known])}")
    return _renumbered(targets, [known.index(name) if name in known else -1 for name in names], len(known))


def _renumbered(targets: Tensor, numbers: Sequence[int], count: int) -> Tensor:
    """Returns the targets with other `numbers` of their classes; -1: a class that is not among the `count`."""
    if targets.ndim == 1:
        return torch.tensor(numbers)[targets]
    fitted = torch.zeros(len(targets), count, dtype=targets.dtype)
    for old, new in enumerate(numbers):
        if new >= 0:
            fitted[:, new] = targets[:, old]
    return fitted


def as_tested(
    samples: Samples, names: Sequence[str] | None, known: Sequence[str] | None
) -> tuple[Samples, tuple[str, ...]]:
    """Returns samples of the classes `names` with the numbers of the `known` ones of a model, and notes.

    A name that the model does not know may be one of its classes in another form, such as TRUE for True. Samples of
    other classes, which it cannot predict, are left out. Raises `UserError` if these are all.
    """
    if names is None or known is None or [*names] == [*known]:
        return samples, ()
    forms = {form(name): name for name in known if sum(form(name) == form(other) for other in known) == 1}
    same = {name: name if name in known else forms.get(form(name), "") for name in names}
    targets = _renumbered(samples.targets, [known.index(each) if each else -1 for each in same.values()], len(known))
    lacking = [name for name in names if not same[name]]
    others = samples.targets[:, [names.index(name) for name in lacking]].any(1) if targets.ndim == 2 else targets < 0
    if others.all():
        raise UserError(f"data: have the classes {listed(lacking)}, which the training data lack: {listed([*known])}")
    read_as = ((name, each) for name, each in same.items() if each and each != name)
    notes = tuple(f"{WARNING}{name} is read as the class {each}" for name, each in read_as)
    if others.any():
        notes += (
            f"{LEFT_OUT}{int(others.sum()):,} of {len(samples):,} samples, of classes that the model does not know "
            f"({listed(lacking)}) and cannot predict",
        )
    kept = samples.select((~others).nonzero().squeeze(1))
    kept.targets = targets[~others]  # type: ignore[misc]
    return kept, notes


def _kind(dataset: Dataset) -> str:
    """Describes the targets of a dataset."""
    targets = dataset.train.targets
    if dataset.classes is None:
        return "numbers" if targets.ndim == 1 else f"{targets.shape[1]} numbers per sample"
    return "several labels per sample" if targets.ndim == 2 else "classes"
