"""Evaluation on the validation and the test set: every sample counts exactly once."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlopt.augment.pipeline import CentreCrop
from dlopt.basics.errors import UserError
from dlopt.basics.interruption import Interruption
from dlopt.config.run_config import RunConfig
from dlopt.data.batches import Batch, Batches, Delivery
from dlopt.data.samples import Samples, at_size, whole_images
from dlopt.data.splits import evaluation_subset
from dlopt.losses import CrossEntropy, processes_in_chunks
from dlopt.metrics.accumulators import Accumulator, Sums, Wholes, accumulators
from dlopt.metrics.declaration import Declaration
from dlopt.metrics.names import VAL_LOSS, Split, by_column, on_set, set_of
from dlopt.metrics.sums import Kept, MetricSum, Reduce
from dlopt.metrics.user import UserMetric, UserMetrics, compute
from dlopt.models.layers import evaluation_mode
from dlopt.parallel.ranks import Ranks
from dlopt.tasks.report import TestReport
from dlopt.tasks.task import Average, Task
from dlopt.tasks.user import OwnTask
from dlopt.training.averaging import WeightAverage, evaluation_weights
from dlopt.training.batch_norm import norm_statistics
from dlopt.training.builders.batches import evaluation_batches, evaluation_model
from dlopt.training.builders.workload import Workload
from dlopt.training.requested_metrics import requested_metrics, tested_metrics
from dlopt.training.task_evaluation import TaskBatches, evaluate_task
from dlopt.training.tta import CHOICES, Flip, MultiScaleTenCrop, ShiftFlip, TenCrop, TestTransform


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    model: Callable[[Tensor], Tensor],
    batches: Iterable[Iterable[Tensor]],
    loss: nn.Module,
    *,
    task: Task,
    split: Split,
    interruption: object = None,
    reduce: Reduce | None = None,
    extra: Sequence[Accumulator] = (),
) -> dict[str, float] | None:
    """Computes sample-weighted means over `batches` by column: loss, accuracy (of classes), `extra` metrics.

    Puts `module` and `loss` into evaluation mode for the call. A rank may have no samples in a batch.

    Args:
        model: calls `module` (compiled, under autocast).
        interruption: checked after each batch.
        reduce: sums over ranks, see `MetricSum`.

    Returns:
        The metrics; None if interrupted.
    """
    metrics = MetricSum(task, reduce=reduce)
    with evaluation_mode(module, loss):
        for inputs, targets in batches:
            outputs = model(inputs)  # also without samples: the forward pass may contain collectives
            if len(targets):
                # The loss is never computed in bf16 or fp16. In chunks it promotes each of them.
                chunked = isinstance(loss, CrossEntropy) and processes_in_chunks(outputs, targets)
                if extra or not chunked:
                    outputs = _promoted(outputs)
                metrics.add(metrics.keep(loss(outputs, targets), outputs, targets))
                for each in extra:
                    each.add(outputs, targets)
            else:
                metrics.add(Kept.of_no_samples(outputs.sum()))
            # With several ranks a collective (`evaluation_stop`), once per batch: all ranks have equally many batches.
            if interruption:
                return None
    # With several ranks collectives, which a rank without samples calls, too.
    means = metrics.means(split)
    for each in extra:
        means |= by_column(split, each.means(reduce))
    return means


TestedSplit = Literal["test", "val"]
Outputs = tuple[Tensor, Tensor]  # outputs and targets of a batch


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
    """Computes loss, accuracy, `metrics` and `user_metrics` of outputs, equal to those in a run's summary.

    `names`: of the classes.
    """
    accumulator = MetricSum(task)
    with torch.inference_mode(), evaluation_mode(loss):
        for outputs, targets in batches:
            accumulator.add(accumulator.keep(loss(outputs, targets), outputs, targets))
    values = accumulator.means(split)
    outputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    part = partial(task.evaluated, loss=loss, origin=targets[:1])
    found = accumulators(metrics, part, task.size, names, Ranks(), keeps=True)
    with torch.inference_mode():
        for each in found:
            each.add(outputs, targets)
            values |= by_column(split, each.means(None))
        values |= by_column(split, compute(user_metrics, outputs, targets))
        return _reported(task, values, found)


def _reported(task: Task, values: dict[str, float], found: Sequence[Sums | Wholes]) -> TestReport:
    """Returns the report of a split, after its evaluation with the accumulators `found`."""
    kept = found[-1] if found else None
    split = kept.split if isinstance(kept, Wholes) else None
    return TestReport(values) if split is None else task.report(values, split)


def described(workload: Workload, tested: TestReport, split: Split) -> TestReport:
    """Returns the report with its split, and beside a constant prediction, chosen on the training set."""
    part, dataset = tested.part, workload.dataset
    unit = (1.0, 0.0) if dataset.columns is None else (dataset.columns.scale, dataset.columns.mean)
    guessing = ""
    if part is not None:
        guessing = workload.task.beside_guessing(part, dataset.train.targets, dataset.classes, unit)
    return replace(tested, split=split, guessing=guessing)


def streamed_report(
    workload: Workload, *, tta: str, members: int = 1, on_batch: Callable[[int, int], None] | None = None
) -> TestReport:
    """Returns the test metrics of a model whose outputs are too large to keep.

    Raises `UserError` for test-time augmentation and ensembles, which average predictions of labels.
    """
    _refuse_tta(workload, "tta", tta)
    if members > 1:
        kind = workload.task.name
        raise UserError(f"checkpoint: {members} models of a {kind} task cannot be averaged; give one checkpoint")
    tested = test_report(workload, on_batch)
    assert tested is not None  # nothing interrupts it
    for name, dataset in workload.validation_sets.items():
        evaluation = _of_set(replace(workload, dataset=dataset), name, lambda done, total: None)
        with norm_statistics(workload):
            tested.metrics.update(evaluation(Interruption()) or {})
    return tested


def _refuse_tta(workload: Workload, key: str, tta: str) -> None:
    if tta != "none" and not workload.task.keeps_outputs:
        kind = workload.task.name
        raise UserError(f"{key}={tta}: averages predictions of labels, which a {kind} task has not; use {key}=none")


def mean_outputs(weighted: Iterable[tuple[float, Tensor]], average: Average) -> Tensor:
    """Returns the mean of (weight, logits), or of their probabilities as logarithms, which are stable."""
    total: Tensor | None = None
    for weight, outputs in weighted:
        if average == "logits":
            total = outputs * weight if total is None else total.add_(outputs, alpha=weight)
        else:
            # The logarithm of the sum of w * p, from log w + log p: a probability that fp32 rounds to zero would have
            # an infinite loss.
            term = outputs.log_softmax(1) + math.log(weight)
            total = term if total is None else torch.logaddexp(total, term)
    assert total is not None
    return total


Validate = Callable[[Interruption], dict[str, float] | None]
"""Returns the metrics of the validation set; None if interrupted."""


def reduction(workload: Workload) -> Reduce | None:
    """Returns the sum over ranks; None for one process."""
    return workload.parallel.ranks.sum if workload.parallel.ranks.processes > 1 else None


def validation(
    workload: Workload,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    on_batch: Callable[[int, int], None],
) -> Validate | None:
    """Builds the validation of the model, or of its weight `average`, on all validation sets; None without any.

    `on_batch(done, total)` is called after each batch of a set. Raises `UserError` for settings that need a validation
    set if there is none.
    """
    run_config = workload.run_config
    datasets = dict(workload.validation_sets)
    if workload.dataset.val is not None:
        datasets = {"": workload.dataset, **datasets}
    elif run_config.validation:
        _refuse_unnamed_set(run_config)
    if not datasets:
        settings = run_config.settings
        if run_config.validation:  # of a probe, which does not read them
            return None
        if settings.monitor != "auto":
            raise UserError(
                f"monitor={settings.monitor}: needs a validation set; set data.val_split=0.1 or monitor=auto"
            )
        if settings.monitor_mode is not None:
            raise UserError(
                f"monitor_mode={settings.monitor_mode}: needs a validation set; set data.val_split=0.1 or "
                "monitor_mode=null"
            )
        if names := ",".join(settings.evaluate.metrics):
            raise UserError(
                f"evaluate.metrics=[{names}]: needs a validation set; set data.val_split=0.1 or evaluate.metrics=[]"
            )
        if (count := settings.evaluate.samples) is not None:
            raise UserError(
                f"evaluate.samples={count}: needs a validation set; set data.val_split=0.1 or evaluate.samples=null"
            )
        for component, other in ((run_config.stopping, "stopping=none"), (run_config.schedule, "schedule=cosine")):
            if "monitor" in component.arguments:
                raise UserError(f"{component.choice}: needs a validation set; set data.val_split=0.1 or {other}")
        return None
    evaluations = {
        name: _of_set(replace(workload, dataset=dataset), name, on_batch) for name, dataset in datasets.items()
    }

    def validate(interruption: Interruption) -> dict[str, float] | None:
        metrics: dict[str, float] = {}
        with evaluation_weights(optimizer, average), norm_statistics(workload, interruption):
            for evaluation in evaluations.values():
                found = evaluation(interruption)
                if found is None:
                    return None
                metrics |= found
        return metrics

    return validate


def _of_set(workload: Workload, name: str, on_batch: Callable[[int, int], None]) -> Validate:
    """Returns the evaluation of `workload.dataset.val`, whose metrics are named after the set `name`, if it has one."""
    run_config, dataset, samples = workload.run_config, workload.dataset, workload.dataset.val
    assert samples is not None
    requested = requested_metrics(run_config, dataset, name)
    origin = samples.targets[:1]
    count, seed = run_config.settings.evaluate.samples, run_config.data_settings.split_seed
    if name and count is not None:
        count = min(count, len(samples))
    subset = evaluation_subset(samples, count, seed)
    own, task = workload.task, dataset.task_on(subset)
    batches: TaskBatches | Batches
    batches = TaskBatches(workload, own, subset) if isinstance(own, OwnTask) else evaluation_batches(workload, subset)

    def evaluation(interruption: Interruption) -> dict[str, float] | None:
        if isinstance(batches, TaskBatches):
            assert isinstance(own, OwnTask)
            stop = workload.parallel.ranks.evaluation_stop(interruption)
            found = evaluate_task(workload, own, batches, "val", stop, on_batch)
        else:
            extra = _accumulators(workload, task, task.computed(requested), origin)
            found = _evaluate(workload, task, batches, "val", extra, interruption, on_batch)
        return found if found is None or not name else on_set(name, found)

    return evaluation


def _refuse_unnamed_set(run_config: RunConfig) -> None:
    """Raises `UserError` for what follows the validation set without a name, in a run that has sets with names only."""
    monitors = {"monitor": run_config.settings.monitor}
    for group, component in (("stopping", run_config.stopping), ("schedule", run_config.schedule)):
        if "monitor" in component.arguments:
            monitors[f"{group}.monitor"] = component.arguments["monitor"]
    for key, monitor in monitors.items():
        if not set_of(monitor, run_config.validation) and monitor != "train_loss":
            allowed = ", ".join(VAL_LOSS.on_set(name).column for name in run_config.validation)
            raise UserError(
                f"{key}={monitor}: the data have no validation set without a name; set {key} to a metric of one that "
                f"has a name: {allowed}, ..."
            )


def _reporting(batches: Batches, on_batch: Callable[[int, int], None] | None) -> Iterator[Batch]:
    """Yields all batches; calls `on_batch(done, total)` after each."""
    for done, batch in enumerate(batches.epoch(0), 1):
        yield batch
        if on_batch is not None:
            on_batch(done, len(batches))


def _evaluate(
    workload: Workload,
    task: Task,
    batches: Batches,
    split: Split,
    found: Sequence[Accumulator],
    interruption: Interruption | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, float] | None:
    functions, ranks = workload.run_config.user_metrics, workload.parallel.ranks
    return evaluate(
        workload.module,
        evaluation_model(workload, batches),
        _reporting(batches, on_batch),
        workload.loss,
        task=task,
        split=split,
        interruption=None if interruption is None else ranks.evaluation_stop(interruption),
        reduce=reduction(workload),
        extra=[*found, *([UserMetrics(functions, ranks)] if functions else [])],
    )


def _accumulators(
    workload: Workload, task: Task, metrics: Sequence[Declaration], origin: Tensor, *, keeps: bool = False
) -> list[Sums | Wholes]:
    names, part = workload.dataset.classes or (), partial(task.evaluated, loss=workload.loss, origin=origin)
    return accumulators(metrics, part, task.size, names, workload.parallel.ranks, keeps=keeps)


def test_report(
    workload: Workload,
    on_batch: Callable[[int, int], None] | None = None,
    interruption: Interruption | None = None,
    split: TestedSplit = "test",
) -> TestReport | None:
    """Tests on a split of the data: the metrics of every evaluation, those that the run requests for its validation,
    and those of tests, by column (test_loss).

    Without this split there are no metrics. Returns None if interrupted (checked after each batch).

    `on_batch(done, total)` is called after each batch, except with test-time augmentation (of the test set only).
    """
    samples = workload.dataset.test if split == "test" else workload.dataset.val
    if samples is None:
        return TestReport({})
    settings, requested = workload.run_config.settings.evaluate, tested_metrics(workload.run_config, workload.task)
    if isinstance(workload.task, OwnTask):
        stop = None if interruption is None else workload.parallel.ranks.evaluation_stop(interruption)
        batches = TaskBatches(workload, workload.task, samples)
        values = evaluate_task(workload, workload.task, batches, split, stop, on_batch)
        return None if values is None else TestReport(values, split=split)
    task = workload.dataset.task_on(samples)
    metrics = task.computed(requested, tests=True)
    if split == "test" and settings.tta != "none":
        outputs = predict_test_set(workload, CHOICES[settings.tta](), _final_average(workload), interruption)
        if outputs is None:
            return None
        functions, names = workload.run_config.user_metrics, workload.dataset.classes or ()
        return described(
            workload, report(outputs, workload.loss, task, metrics, user_metrics=functions, names=names), split
        )
    found = _accumulators(workload, task, metrics, samples.targets[:1], keeps=task.keeps_outputs)
    with norm_statistics(workload, interruption):
        tested = evaluation_batches(workload, samples)
        values = _evaluate(workload, task, tested, split, found, interruption, on_batch)
    return None if values is None else described(workload, _reported(task, values, found), split)


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


def _final_average(workload: Workload) -> Average:
    average = workload.run_config.settings.evaluate.average
    # The key has a default, which the outputs of some tasks do not allow.
    chosen = None if workload.task.accuracy is None else average
    return workload.task.choose_average(chosen, workload.loss, "evaluate.average")


def predict_test_set(
    workload: Workload,
    choice: Flip | ShiftFlip | TenCrop | MultiScaleTenCrop | None,
    average: Average,
    interruption: Interruption | None = None,
    samples: Samples | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Outputs] | None:
    """Returns outputs (fp32 or fp64, on the device) and targets of the test set, in its order, batch by batch.

    None if interrupted.

    choice: the test-time augmentation whose outputs are averaged; None for that of the final test of `dlopt train`.
    `samples`: None for the test set; or those of a validation set.
    `on_batch(done, total)` is called after each batch.
    """
    samples = workload.dataset.test if samples is None else samples
    if samples is None:
        raise UserError(f"{workload.run_config.data.choice}: this dataset has no test set")
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
    on_batch: Callable[[int, int], None] | None,
) -> list[Outputs] | None:
    """Returns outputs and targets batch by batch; each process computes its own samples. None if interrupted."""
    workload.module.eval()
    mode = workload.parallel
    stop = None if interruption is None else mode.ranks.evaluation_stop(interruption)
    local_outputs = []
    for inputs, targets in _reporting(batches, on_batch):
        local_outputs.append((_promoted(model(inputs)), targets) if len(targets) else None)
        # A collective, as in `evaluate`.
        if stop:
            return None
    if mode.split.evaluation_shard is None:
        return [batch for batch in local_outputs if batch is not None]
    # Batch by batch: the ranks hold adjacent slices of each batch, not of the data set. Joined per batch, the outputs
    # are in the order of the data set, which `dlopt predict` writes and ensembles rely on.
    ranks = mode.ranks.gather([[batch and tuple(tensor.cpu() for tensor in batch) for batch in local_outputs]])
    gathered = []
    for shards in zip(*ranks, strict=True):
        outputs, targets = (torch.cat(column) for column in zip(*(s for s in shards if s is not None), strict=True))
        gathered.append((outputs.to(mode.device), targets.to(mode.device)))
    return gathered


def _promoted(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _normalized(workload: Workload, images: Tensor) -> Tensor:
    return workload.normalize(images).to(dtype=workload.precision.dtype, memory_format=workload.memory_format)


@torch.inference_mode()
def _build_transform(workload: Workload, choice: Any, samples: Samples, *, key: str = "tta") -> TestTransform:
    """Builds the transform for `samples`. Raises `UserError` for other data than images, or for a wrong crop size."""
    if len(samples.shape) != 3:
        raise UserError(f"{key}: the samples of {workload.run_config.data.choice} are not images; use {key}=none")
    channels, *image = samples.shape
    shape = samples.shape if workload.augment is None else workload.augment.output_shape
    transform: TestTransform = choice.build((shape[1], shape[2]), (image[0], image[1]))
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
    run_config, in_memory = workload.run_config, workload.dataset.in_memory
    data = run_config.data_settings
    size = transform.image_size
    if (images := whole_images(samples)) is not None and min(size) > min(samples.shape[1:]):
        samples, in_memory = at_size(images, size), False
    mode, dtype = workload.parallel, workload.precision.data_dtype
    delivery = Delivery(workload.device, in_memory, data.workers, dtype=dtype, processes=mode.ranks.local_processes)
    return Batches(samples, delivery, batch_size=data.batch_size, shard=mode.split.evaluation_shard)
