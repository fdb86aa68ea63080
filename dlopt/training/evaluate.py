"""Evaluation on the validation and the test set: every sample counts exactly once."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from dlopt.augment.pipeline import CentreCrop
from dlopt.basics.errors import UserError
from dlopt.basics.interruption import Interruption
from dlopt.config.rules import require_named_monitors, require_validation_set
from dlopt.data.batches import Batch, Batches, Delivery
from dlopt.data.samples import Dataset, Samples
from dlopt.data.splits import evaluation_subset
from dlopt.losses import CrossEntropy, processes_in_chunks
from dlopt.metrics.accumulators import Accumulator, Sums, Wholes, accumulators
from dlopt.metrics.declaration import Declaration
from dlopt.metrics.names import Split, by_column, on_set
from dlopt.metrics.sums import Kept, MetricSum, Reduce
from dlopt.metrics.user import UserMetric, UserMetrics, compute
from dlopt.models.layers import evaluation_mode
from dlopt.parallel.ranks import Ranks
from dlopt.tasks.report import TestReport
from dlopt.tasks.task import Average, Task
from dlopt.training.averaging import WeightAverage, evaluation_weights
from dlopt.training.batch_norm import norm_statistics
from dlopt.training.builders.batches import evaluation_batches, evaluation_model
from dlopt.training.builders.further import names_of, reader
from dlopt.training.builders.workload import Workload
from dlopt.training.requested_metrics import requested_metrics, tested_metrics
from dlopt.training.task_evaluation import TaskBatches, evaluate_task
from dlopt.training.tta import CHOICES, Augmentation, TestTransform

TestedSplit = Literal["test", "val"]
Outputs = tuple[Tensor, Tensor]  # outputs and targets of a batch
OnBatch = Callable[[int, int], None]
"""Called with (done, total) after each batch of a split."""
Evaluation = Callable[[Interruption | None], TestReport | None]
"""Evaluates a split; returns None if interrupted."""
Validate = Callable[[Interruption], dict[str, float] | None]
"""Returns the metrics of the validation sets; None if interrupted."""


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    model: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    loss: nn.Module,
    *,
    task: Task,
    split: Split,
    interruption: object = None,
    reduce: Reduce | None = None,
    extra: Sequence[Accumulator] = (),
) -> dict[str, float] | None:
    """Returns sample-weighted means over `batches` by column: loss, accuracy (of classes), `extra` metrics.

    Puts `module` and `loss` into evaluation mode for the call. A rank may have no samples in a batch.

    Args:
        model: calls `module` (compiled, under autocast).
        interruption: checked after each batch; returns None when it is true.
        reduce: sums over ranks, see `MetricSum`.
    """
    metrics = MetricSum(task, reduce=reduce)
    with evaluation_mode(module, loss):
        for batch in batches:
            inputs, targets = batch
            outputs = model(inputs)  # also without samples: it may contain collectives
            if len(targets):
                # The loss is never computed in bf16 or fp16. In chunks it promotes each of them.
                chunked = isinstance(loss, CrossEntropy) and processes_in_chunks(outputs, targets)
                if extra or not chunked:
                    outputs = _promoted(outputs)
                metrics.add(metrics.keep(loss(outputs, targets, **batch.further), outputs, targets))
                for each in extra:
                    each.add(outputs, targets)
            else:
                metrics.add(Kept.of_no_samples(outputs.sum()))
            # With several ranks a collective (`evaluation_stop`): all ranks have equally many batches.
            if interruption:
                return None
    means = metrics.means(split)  # a collective, as those of `extra`
    for each in extra:
        means |= by_column(split, each.means(reduce))
    return means


def _evaluation(
    workload: Workload,
    samples: Samples,
    split: TestedSplit,
    requested: Sequence[Declaration],
    on_batch: OnBatch | None,
    *,
    count: int | None = None,
    tests: bool = False,
) -> Evaluation:
    """Returns the evaluation of `samples`, or of `count` of them.

    `tests`: computes the metrics of tests, too, and what a test shows of all samples.
    """
    run_config, ranks, origin = workload.run_config, workload.parallel.ranks, samples.targets[:1]
    samples = evaluation_subset(samples, count, run_config.data_settings.split_seed)
    task, functions, names = workload.dataset.task_on(samples), run_config.user_metrics, workload.dataset.classes or ()
    batches = TaskBatches(workload, samples) if task.calls_model else evaluation_batches(workload, samples)
    metrics = task.computed(requested, tests=tests)
    part = partial(task.evaluated, loss=workload.loss, origin=origin)

    def evaluation(interruption: Interruption | None) -> TestReport | None:
        stop = None if interruption is None else ranks.evaluation_stop(interruption)
        if isinstance(batches, TaskBatches):
            values = evaluate_task(workload, batches, split, stop, on_batch)
            return None if values is None else TestReport(values)
        found = accumulators(metrics, part, task.outputs, names, ranks, keeps=tests and task.keeps_outputs)
        values = evaluate(
            workload.module,
            evaluation_model(workload, batches),
            _reporting(batches, on_batch),
            workload.loss,
            task=task,
            split=split,
            interruption=stop,
            reduce=reduction(workload),
            extra=[*found, *([UserMetrics(functions, ranks)] if functions else [])],
        )
        return None if values is None else _reported(task, values, found if tests else ())

    return evaluation


def reduction(workload: Workload) -> Reduce | None:
    """Returns the sum over ranks; None for one process."""
    return workload.parallel.ranks.sum if workload.parallel.ranks.processes > 1 else None


def _reporting(batches: Batches, on_batch: OnBatch | None) -> Iterator[Batch]:
    for done, batch in enumerate(batches.epoch(0), 1):
        yield batch
        if on_batch is not None:
            on_batch(done, len(batches))


def _reported(task: Task, values: dict[str, float], found: Sequence[Sums | Wholes]) -> TestReport:
    """Returns the report of a split, after its evaluation with the accumulators `found`."""
    kept = found[-1] if found else None
    split = kept.split if isinstance(kept, Wholes) else None
    return TestReport(values) if split is None else task.report(values, split)


def validation(
    workload: Workload, optimizer: torch.optim.Optimizer, average: WeightAverage | None, on_batch: OnBatch
) -> Validate | None:
    """Builds the validation of the model, or of its weight `average`, on all validation sets; None without any.

    Raises `UserError` for settings that need a validation set if there is none.
    """
    run_config, datasets = workload.run_config, dict(workload.validation_sets)
    if workload.dataset.val is not None:
        datasets = {"": workload.dataset, **datasets}
    elif run_config.validation:
        require_named_monitors(run_config)
    else:
        require_validation_set(run_config)
    if not datasets:  # a probe does not read the sets with names, either
        return None
    evaluations = {name: _of_set(workload, name, dataset, on_batch) for name, dataset in datasets.items()}

    def validate(interruption: Interruption) -> dict[str, float] | None:
        metrics: dict[str, float] = {}
        with evaluation_weights(optimizer, average), norm_statistics(workload, interruption):
            for name, evaluation in evaluations.items():
                if (found := evaluation(interruption)) is None:
                    return None
                metrics |= on_set(name, found.metrics) if name else found.metrics
        return metrics

    return validate


def _of_set(workload: Workload, name: str, dataset: Dataset, on_batch: OnBatch | None = None) -> Evaluation:
    """Returns the evaluation of `dataset.val`. `name`: of the validation set, if it has one."""
    samples, count = dataset.val, workload.run_config.settings.evaluate.samples
    assert samples is not None
    requested = requested_metrics(workload.run_config, dataset, name)
    if name and count is not None:
        count = min(count, len(samples))
    return _evaluation(replace(workload, dataset=dataset), samples, "val", requested, on_batch, count=count)


def test_report(
    workload: Workload,
    on_batch: OnBatch | None = None,
    interruption: Interruption | None = None,
    split: TestedSplit = "test",
) -> TestReport | None:
    """Tests on a split: the metrics of every evaluation, those requested for the validation, and those of tests.

    Without this split there are no metrics. Returns None if interrupted (checked after each batch). Does not call
    `on_batch` with test-time augmentation, which is of the test set only.
    """
    samples = workload.dataset.test if split == "test" else workload.dataset.val
    if samples is None:
        return TestReport({})
    run_config, task = workload.run_config, workload.dataset.task_on(samples)
    requested, tta = tested_metrics(run_config, workload.task), run_config.settings.evaluate.tta
    tested: TestReport | None = None
    if split == "test" and tta != "none":
        outputs = predict_samples(
            workload, samples, CHOICES[tta](), _final_average(workload), interruption=interruption
        )
        if outputs is not None:
            metrics, names = task.computed(requested, tests=True), workload.dataset.classes or ()
            tested = report(outputs, workload.loss, task, metrics, user_metrics=run_config.user_metrics, names=names)
    else:
        evaluation = _evaluation(workload, samples, split, requested, on_batch, tests=True)
        with norm_statistics(workload, interruption):
            tested = evaluation(interruption)
    return None if tested is None else described(workload, tested, split)


def described(workload: Workload, tested: TestReport, split: Split) -> TestReport:
    """Returns the report with its split, and beside a constant prediction, chosen on the training set."""
    part, dataset = tested.part, workload.dataset
    unit = (1.0, 0.0) if dataset.columns is None else (dataset.columns.scale, dataset.columns.mean)
    guessing = ""
    if part is not None:
        guessing = workload.task.beside_guessing(part, dataset.train.targets, dataset.classes, unit)
    return replace(tested, split=split, guessing=guessing)


def report(
    batches: Sequence[Outputs],
    loss: nn.Module,
    task: Task,
    metrics: Sequence[Declaration],
    *,
    user_metrics: Mapping[str, UserMetric] = MappingProxyType({}),
    names: Sequence[str] = (),
    split: TestedSplit = "test",
) -> TestReport:
    """Computes loss, accuracy, `metrics` and `user_metrics` of outputs as a run does. `names`: of the classes."""
    accumulator = MetricSum(task)
    with torch.inference_mode(), evaluation_mode(loss):
        for outputs, targets in batches:
            accumulator.add(accumulator.keep(loss(outputs, targets), outputs, targets))
    values = accumulator.means(split)
    outputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    part = partial(task.evaluated, loss=loss, origin=targets[:1])
    found = accumulators(metrics, part, task.outputs, names, Ranks(), keeps=True)
    with torch.inference_mode():
        for each in found:
            each.add(outputs, targets)
            values |= by_column(split, each.means(None))
        values |= by_column(split, compute(user_metrics, outputs, targets))
        return _reported(task, values, found)


def streamed_report(workload: Workload, *, tta: str, members: int = 1, on_batch: OnBatch | None = None) -> TestReport:
    """Returns the test metrics of a model whose outputs are too large to keep, or whose loss reads further tensors.

    Raises `UserError` for test-time augmentation and ensembles, which average predictions of labels.
    """
    _refuse_tta(workload, "tta", tta)
    if members > 1 and workload.task.keeps_outputs:
        raise UserError(f"{reader(workload)}, so {members} models cannot be averaged; give one checkpoint")
    if members > 1:
        kind = workload.task.name
        raise UserError(f"checkpoint: {members} models of a {kind} task cannot be averaged; give one checkpoint")
    tested = test_report(workload, on_batch)
    assert tested is not None  # nothing interrupts it
    for name, dataset in workload.validation_sets.items():
        evaluation = _of_set(workload, name, dataset)
        with norm_statistics(workload):
            found = evaluation(None)
        tested.metrics.update({} if found is None else on_set(name, found.metrics))
    return tested


def check_crops(workload: Workload) -> None:
    """Raises `UserError` if the run evaluates images that are smaller than the crops on which it trains."""
    dataset, settings = workload.dataset, workload.run_config.settings.evaluate
    is_tested = settings.test and settings.tta == "none" and dataset.test is not None
    if workload.augment is not None and (is_tested or dataset.val is not None):
        CentreCrop(workload.augment.output_shape).corner(*dataset.train.shape[1:])


def has_train_accuracy(workload: Workload) -> bool:
    """Decides about evaluate.train_accuracy. Raises `UserError` for targets that are not classes."""
    setting = workload.run_config.settings.evaluate.train_accuracy
    if setting is True and workload.task.accuracy is None:
        raise UserError(
            "evaluate.train_accuracy=true: the targets are numbers, not classes; use evaluate.train_accuracy=auto"
        )
    return workload.task.measures_train_accuracy if setting == "auto" else setting


def check_tta(workload: Workload) -> None:
    """Raises `UserError` if the final test does not support `evaluate.tta`."""
    tta = workload.run_config.settings.evaluate.tta
    if tta == "none" or workload.dataset.test is None:
        return
    _refuse_tta(workload, "evaluate.tta", tta)
    if (processes := workload.parallel.ranks.processes) > 1:
        raise UserError(
            f"evaluate.tta={tta}: the final test with {processes} processes does not support it; "
            f"use evaluate.tta=none, then dlopt eval tta={tta}"
        )
    _build_transform(workload, CHOICES[tta](), workload.dataset.test, key="evaluate.tta")
    _final_average(workload)


def _refuse_tta(workload: Workload, key: str, tta: str) -> None:
    if tta != "none" and not workload.task.keeps_outputs:
        kind = workload.task.name
        raise UserError(f"{key}={tta}: averages predictions of labels, which a {kind} task has not; use {key}=none")
    if tta != "none" and names_of(workload.loss):
        raise UserError(f"{reader(workload)}, which {key}={tta} does not pass; use {key}=none")


def _final_average(workload: Workload) -> Average:
    # The key has a default, which the outputs of some tasks do not allow.
    chosen = None if workload.task.accuracy is None else workload.run_config.settings.evaluate.average
    return workload.task.choose_average(chosen, workload.loss, "evaluate.average")


def predict_samples(
    workload: Workload,
    samples: Samples,
    choice: Augmentation | None,
    average: Average,
    *,
    interruption: Interruption | None = None,
    on_batch: OnBatch | None = None,
) -> list[Outputs] | None:
    """Returns outputs (fp32 or fp64, on the device) and targets in the order of `samples`; None if interrupted.

    `choice`: the test-time augmentation whose outputs are averaged.
    """
    with norm_statistics(workload):
        if choice is None:
            batches = evaluation_batches(workload, samples)
            return _outputs(workload, evaluation_model(workload, batches), batches, interruption, on_batch)
        transform = _build_transform(workload, choice, samples)
        with contextlib.closing(_image_batches(workload, samples, transform)) as batches:
            model = evaluation_model(workload, batches)

            def averaged(images: Tensor) -> Tensor:
                crops = ((weight, _normalized(workload, crop)) for weight, crop in transform.crops(images))
                return mean_outputs(((weight, _promoted(model(inputs))) for weight, inputs in crops), average)

            return _outputs(workload, averaged, batches, interruption, on_batch)


@torch.inference_mode()
def _outputs(
    workload: Workload,
    model: Callable[[Tensor], Tensor],
    batches: Batches,
    interruption: Interruption | None,
    on_batch: OnBatch | None,
) -> list[Outputs] | None:
    workload.module.eval()
    mode = workload.parallel
    stop = None if interruption is None else mode.ranks.evaluation_stop(interruption)
    local_outputs = []
    for inputs, targets in _reporting(batches, on_batch):
        local_outputs.append((_promoted(model(inputs)), targets) if len(targets) else None)
        if stop:  # a collective, as in `evaluate`
            return None
    if mode.split.evaluation_shard is None:
        return [batch for batch in local_outputs if batch is not None]
    # The ranks hold adjacent slices of each batch: joined per batch, the outputs are in the order of the data set.
    ranks = mode.ranks.gather([[batch and tuple(tensor.cpu() for tensor in batch) for batch in local_outputs]])
    gathered = []
    for shards in zip(*ranks, strict=True):
        outputs, targets = (torch.cat(column) for column in zip(*(s for s in shards if s is not None), strict=True))
        gathered.append((outputs.to(mode.device), targets.to(mode.device)))
    return gathered


def mean_outputs(weighted: Iterable[tuple[float, Tensor]], average: Average) -> Tensor:
    """Returns the mean of (weight, logits), or of their probabilities as logarithms, which are stable."""
    total: Tensor | None = None
    for weight, outputs in weighted:
        if average == "logits":
            total = outputs * weight if total is None else total.add_(outputs, alpha=weight)
        else:
            # log sum w * p, from log w + log p: a probability that fp32 rounds to zero would have an infinite loss.
            term = outputs.log_softmax(1) + math.log(weight)
            total = term if total is None else torch.logaddexp(total, term)
    assert total is not None
    return total


def _promoted(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _normalized(workload: Workload, images: Tensor) -> Tensor:
    return workload.normalize(images).to(dtype=workload.precision.dtype, memory_format=workload.memory_format)


@torch.inference_mode()
def _build_transform(workload: Workload, choice: Augmentation, samples: Samples, *, key: str = "tta") -> TestTransform:
    """Builds the transform for `samples`. Raises `UserError` for other data than images, or for a wrong crop size."""
    if len(samples.shape) != 3:
        raise UserError(f"{key}: the samples of {workload.run_config.data.choice} are not images; use {key}=none")
    channels, height, width = samples.shape
    shape = samples.shape if workload.augment is None else workload.augment.output_shape
    transform = choice.build((shape[1], shape[2]), (height, width))
    if transform.crop_size != tuple(shape[1:]):
        probe = torch.zeros(2, channels, *transform.crop_size, device=workload.device)
        workload.module.eval()
        try:
            workload.module(_normalized(workload, probe))
        except (RuntimeError, UserError):
            raise UserError(
                f"tta.crop={transform.crop_size[0]}: this model, or its normalization, accepts only images of "
                f"{shape[1]}x{shape[2]} pixels"
            ) from None
    return transform


def _image_batches(workload: Workload, samples: Samples, transform: TestTransform) -> Batches:
    """Returns batches of images before normalization. Files are decoded at the largest size that the crops need."""
    mode, data, in_memory = workload.parallel, workload.run_config.data_settings, workload.dataset.in_memory
    if samples.is_cut and min(transform.image_size) > min(samples.shape[1:]):
        samples, in_memory = samples.resized(transform.image_size), False
    dtype, processes = workload.precision.data_dtype, mode.ranks.local_processes
    delivery = Delivery(workload.device, in_memory, data.workers, dtype=dtype, processes=processes)
    return Batches(samples, delivery, batch_size=data.batch_size, shard=mode.split.evaluation_shard)
