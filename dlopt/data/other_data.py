"""Fits samples of other data to the data that a model was trained on: columns, class numbers, kinds of targets."""

from collections.abc import Sequence

import torch

from dlopt.basics.errors import UserError
from dlopt.data.checks import LEFT_OUT, WARNING, form, listed
from dlopt.data.samples import Dataset, Samples
from dlopt.tasks.text import NextToken


def as_trained(samples: Samples, source: Dataset, trained: Dataset) -> Samples:
    """Returns samples of `source` with the columns and the class numbers of the data `trained`.

    Classes and columns are matched by name. Raises `UserError` if they are not those of the same task.
    """
    if source.layout != trained.layout:
        mine, other = (each.layout or "one input and one label" for each in (source, trained))
        raise UserError(f"its items have {mine}, those of the training data {other}")
    is_text, was_text = (each.kind == "text" for each in (samples, trained.train))
    if is_text != was_text:
        kinds = ["text" if each else "no text" for each in (is_text, was_text)]
        raise UserError(f"is {kinds[0]}, the training data are {kinds[1]}")
    if is_text:
        own, task = source.task, trained.task  # a task of the user's own reads anything
        if isinstance(own, NextToken) and isinstance(task, NextToken):
            mine, other = (f"{each.unit}s of a vocabulary of {each.outputs:,}" for each in (own, task))
            if mine != other:
                raise UserError(f"has {mine}, the training data {task.unit}s of {task.outputs:,}")
        return samples
    samples = samples.encoded(trained.columns)
    kinds = [_kind(each) for each in (source, trained)]
    if kinds[0] != kinds[1]:
        raise UserError(f"its targets are {kinds[0]}, those of the training data {kinds[1]}")
    return with_classes(samples, source.classes, trained.classes)[0]


def with_classes(
    samples: Samples, names: Sequence[str] | None, known: Sequence[str] | None, *, leaves_out: bool = False
) -> tuple[Samples, tuple[str, ...]]:
    """Returns samples of the classes `names` with the numbers of the `known` ones of a model, and notes.

    `leaves_out`: samples of other classes, which the model cannot predict, but for a name that is one of its classes in
    another form, such as TRUE for True. Raises `UserError` if these are all samples; otherwise for any other class.
    """
    if names is None or known is None or [*names] == [*known]:
        return samples, ()
    targets, alike = samples.targets, [*map(form, known)]
    forms = {form(name): name for name in known if leaves_out and alike.count(form(name)) == 1}
    same = [name if name in known else forms.get(form(name), "") for name in names]
    numbers = torch.tensor([known.index(each) if each else -1 for each in same])
    used = targets.any(0) if targets.ndim == 2 else torch.bincount(targets, minlength=len(names)) > 0
    lacking = [name for name, each, is_used in zip(names, same, used.tolist(), strict=True) if is_used and not each]
    others = targets[:, numbers < 0].any(1) if targets.ndim == 2 else numbers[targets] < 0
    if others.all() or (lacking and not leaves_out):
        raise UserError(f"the data have the classes {listed(lacking)}, those of the training are {listed([*known])}")
    renamed = [(name, each) for name, each in zip(names, same, strict=True) if each and each != name]
    notes = tuple(f"{WARNING}{name} is read as the class {each}" for name, each in renamed)
    if lacking:
        count = f"{int(others.sum()):,} of {len(samples):,} samples"
        notes += (f"{LEFT_OUT}{count}, of classes that the model does not know ({listed(lacking)})",)
    kept = samples.select((~others).nonzero().squeeze(1)) if lacking else samples
    hot = torch.eye(len(known) + 1)[numbers, :-1]  # of a class that the model does not know: zeros
    known_targets = (targets @ hot).clamp(max=1) if targets.ndim == 2 else numbers[targets]
    return kept.with_targets(known_targets[~others]), notes


def _kind(dataset: Dataset) -> str:
    """Describes the targets of a dataset."""
    targets = dataset.train.targets
    if dataset.classes is None:
        return "numbers" if targets.ndim == 1 else f"{targets.shape[1]} numbers per sample"
    return "several labels per sample" if targets.ndim == 2 else "classes"
