"""Tests one model, or the average of several (an ensemble), on the test set."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dlopt.basics.errors import UserError
from dlopt.config.run_config import RunConfig
from dlopt.data.checks import problems
from dlopt.data.identity import difference
from dlopt.data.samples import Dataset
from dlopt.metrics.declaration import Declaration
from dlopt.metrics.names import Metric, Split, on_set
from dlopt.metrics.user import UserMetric
from dlopt.parallel.mode import Mode
from dlopt.tasks.report import TestReport
from dlopt.tasks.task import Average, Task
from dlopt.trained.restore import fitting
from dlopt.training.builders.further import names_of
from dlopt.training.builders.workload import Workload, build_workload, data_spec, with_validation_sets
from dlopt.training.checkpoint.checkpoints import foreign
from dlopt.training.checkpoint.content import Checkpoint
from dlopt.training.checkpoint.weights import other_class
from dlopt.training.evaluate import (
    Outputs,
    described,
    mean_outputs,
    predict_samples,
    report,
    streamed_report,
)
from dlopt.training.requested_metrics import tested_metrics


@dataclass(frozen=True)
class Tested:
    """The result of a checkpoint, an ensemble, or a file of weights.

    `samples`: how many were tested. `average`: the quantity averaged over crops and models. `problems`: data that were
    left out, or look wrong.
    `workload`: of a test whose outputs were not kept. `sets`: names of validation sets.
    `split`: of the samples, after which the metrics are named. `dataset`: with the tested samples as its test set.
    """

    report: TestReport
    average: Average
    classes: tuple[str, ...] | None
    problems: Sequence[str]
    samples: int
    workload: Workload | None = None
    sets: Sequence[str] = ()
    split: Split = "test"
    dataset: Dataset | None = None

    @property
    def per_class(self) -> list[dict[str, Any]]:
        """The metrics of each class; [] for other tasks."""
        return [] if self.classes is None else self.report.per_class(self.classes)


@dataclass(frozen=True)
class _Predictions:
    path: Path
    average: Average
    classes: tuple[str, ...] | None
    loss: nn.Module
    task: Task
    user_metrics: Mapping[str, UserMetric]
    metrics: Sequence[Declaration]
    batches: Sequence[Outputs]
    split: tuple[object, ...]  # the split, and unless it is the test set, what divides the data
    on_sets: Mapping[str, Sequence[Outputs]]  # of the named validation sets

    def check_matches(self, first: "_Predictions") -> None:
        """Raises `UserError` unless the two models were tested on the same samples and have outputs of one kind."""
        if self.average != first.average:
            raise UserError(
                f"checkpoint={self.path}: trained with a different loss than {first.path}; use average=logits"
            )
        if self.classes != first.classes:
            raise UserError(f"checkpoint={self.path}: its classes differ from those of {first.path}")
        same = len(self.batches) == len(first.batches) and all(
            torch.equal(a, b) for (_, a), (_, b) in zip(self.batches, first.batches, strict=True)
        )
        if not same or self.split != first.split:
            raise UserError(f"checkpoint={self.path}: its {self.split[0]} set differs from that of {first.path}")


def test(
    paths: Sequence[Path],
    workloads: Iterable[Workload],
    average: Average | None,
    views: Any,
    tta: str,
    on_batch: Callable[[int, int], None] | None = None,
    split: str | None = None,
) -> Tested:
    """Tests the models one by one, and reports the metrics of the average of their outputs. Raises `UserError`.

    Args:
        paths: of the models, for messages.
        workloads: built one by one, because an ensemble may not fit into memory.
        views: test-time augmentation, the choice `tta`; None for none.
        on_batch: called with (done, total) after each batch of a model.
        split: train, val or test; None: the test set, or without one the validation set.
    """
    models: list[_Predictions] = []
    found: list[str] = []
    for path, workload in zip(paths, workloads, strict=True):
        workload, used = _on_split(workload, split)
        chosen = workload.task.choose_average(average, workload.loss, "average")
        if not workload.task.keeps_outputs or names_of(workload.loss):
            tested = streamed_report(workload, tta=tta, members=len(paths), on_batch=on_batch)
            found, count = problems(workload.dataset.notes), len(workload.dataset.test or ())
            sets, classes = [*workload.validation_sets], workload.class_names
            return Tested(_named(tested, used), chosen, classes, found, count, workload, sets, used, workload.dataset)
        assert workload.dataset.test is not None  # see `_on_split`
        batches = predict_samples(workload, workload.dataset.test, views, chosen, on_batch=on_batch) or []
        kind = (workload.dataset.classes, workload.loss, workload.task)
        metrics = workload.task.computed(tested_metrics(workload.run_config, workload.task), tests=True)
        on_sets = {}
        for name, dataset in workload.validation_sets.items():
            assert dataset.val is not None
            on_sets[name] = predict_samples(workload, dataset.val, views, chosen) or []
        data, functions = workload.run_config.data_settings, workload.run_config.user_metrics
        keys = (data.val_split, data.subset, data.split_seed, data.folds, data.fold)
        division = (used, *(keys if used != "test" else ()))
        models.append(_Predictions(path, chosen, *kind, functions, metrics, batches, division, on_sets))
        models[-1].check_matches(models[0])
        found += [line for line in problems(workload.dataset.notes) if line not in found]
    first = models[0]
    combined = _combine([model.batches for model in models], first.average)
    computed = partial(
        report,
        loss=first.loss,
        task=first.task,
        metrics=first.metrics,
        user_metrics=first.user_metrics,
        names=first.classes or (),
    )
    tested = computed(combined)
    for name in first.on_sets:
        combined = _combine([model.on_sets[name] for model in models], first.average)
        tested.metrics.update(on_set(name, computed(combined, split="val").metrics))
    count = sum(len(targets) for _, targets in first.batches)
    named = described(workload, _named(tested, used), used)
    sets = [*first.on_sets]
    return Tested(named, first.average, first.classes, found, count, None, sets, used, workload.dataset)


def _on_split(workload: Workload, split: str | None) -> tuple[Workload, Split]:
    """Returns the workload with a split of its data as its test set, and the split. Raises `UserError`."""
    dataset = workload.dataset
    splits = {"test": dataset.test, "val": dataset.val, "train": dataset.train}
    # Other data than those of the run are tested whole: they are the training set, too.
    if dataset.val is None and dataset.test is not None and torch.equal(dataset.test.targets, dataset.train.targets):
        del splits["train"]
    chosen = split or ("val" if dataset.test is None and dataset.val is not None else "test")
    if splits.get(chosen) is None:
        allowed = ", ".join(name for name, samples in splits.items() if samples is not None)
        raise UserError(f"split={chosen}: {workload.run_config.data.choice} has no {chosen} set; allowed: {allowed}")
    used = "evaluated_train" if chosen == "train" else chosen
    return replace(workload, dataset=replace(dataset, test=splits[chosen])), cast(Split, used)


def _named(tested: TestReport, split: Split) -> TestReport:
    """Returns the report with its test metrics named after the split."""

    def column(key: str) -> str:
        metric = Metric.of(key)
        return replace(metric, split=split).column if metric is not None and metric.split == "test" else key

    return replace(tested, metrics={column(key): each for key, each in tested.metrics.items()}, split=split)


def _combine(models: Sequence[Sequence[Outputs]], average: Average) -> Sequence[Outputs]:
    """Averages the outputs of models on the same samples; returns the outputs of a single model unchanged."""
    if len(models) == 1:
        return models[0]
    weight = 1 / len(models)
    return [
        (mean_outputs([(weight, outputs) for outputs, _ in batches], average), batches[0][1])
        for batches in zip(*models, strict=True)
    ]


def restored(
    paths: Sequence[Path],
    checkpoints: Sequence[Checkpoint],
    run_configs: Sequence[RunConfig],
    mode: Mode,
    warn: Callable[[str], object],
) -> Iterator[Workload]:
    """Builds the models of checkpoints one by one: an ensemble may not fit into memory. Raises `UserError`.

    `warn`: called on rank 0 if the data, or the folder of a checkpoint, belong to another run.
    """
    for path, checkpoint, run_config in zip(paths, checkpoints, run_configs, strict=True):
        with fitting(path):
            # Of the training set, which is not read here, only the number of samples and the labels are compared.
            workload = build_workload(run_config, checkpoint, parallel=mode, tests=True)
            _check_classes(path, checkpoint.classes, workload.dataset.classes)
            if run_config.validation:
                workload = with_validation_sets(workload, identifies=True)
            mode.ranks.refuse_other_file("checkpoint", path)
            workload.load(checkpoint)
        shape = workload.dataset.train.shape
        if not workload.task.accepts(shape, checkpoint.sample):
            warn(
                f"warning: checkpoint={path}: trained on samples of the shape {list(checkpoint.sample)}, those of the "
                f"data have {list(shape)}"
            )
        if (found := difference(checkpoint.identity, data_spec(workload)["identity"])) is not None:
            warn(f"warning: checkpoint={path}: the data are not those of its run: {found}")
        if mode.ranks.is_main and (found := foreign(path, checkpoint)) is not None:
            warn(f"warning: {found}")
        yield workload


def _check_classes(path: Path, trained: Sequence[str] | None, classes: Sequence[str] | None) -> None:
    """Raises `UserError` if the model was trained with other classes than the data's."""
    if (other := other_class(trained, classes)) is not None:
        raise UserError(f"checkpoint={path}: trained with other classes than those of the data: {other}")
