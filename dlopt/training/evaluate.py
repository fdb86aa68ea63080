"""Testing a model on a split: every sample exactly once."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlopt.data.batches import Batches, Delivery
from dlopt.data.samples import Dataset, Files, Samples
from dlopt.data.splits import prepare
from dlopt.errors import UserError
from dlopt.interruption import Interruption
from dlopt.losses import MSE, probabilities
from dlopt.training.averaging import ExponentialAverage, at_evaluation_point
from dlopt.training.batch_norm import norm_statistics
from dlopt.training.build import Workload, evaluation_batches
from dlopt.training.metrics import (
    ExtraMetrics,
    MetricSum,
    Reduce,
    absolute_error,
    calibration_error,
    confusion_matrix,
    determination,
    extra_metrics,
    f1_scores,
    top_accuracy,
)
from dlopt.training.tta import CHOICES, Flip, MultiScaleTenCrop, Plan, ShiftFlip, TenCrop


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: nn.Module,
    *,
    classify: bool,
    prefix: str,
    interruption: object = None,
    reduce: Reduce | None = None,
    more: ExtraMetrics | None = None,
) -> dict[str, float] | None:
    """Sample-weighted means over `batches`: {prefix}_loss, {prefix}_accuracy (of a classification), what `more` counts.

    None when `interruption` became true on the way. `model` is how `module` is called (compiled, under autocast);
    both are in evaluation mode within, and back in their former mode afterwards. `reduce`: see `MetricSum`; a rank
    may have no samples in a batch.
    """
    sums = MetricSum(classify, reduce=reduce)
    modes = module.training, loss.training
    module.eval(), loss.eval()
    try:
        for inputs, targets in batches:
            outputs = model(inputs)  # also without samples: other ranks may wait within it
            if len(targets):
                outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # a loss needs more than bf16
                sums.add(loss(outputs, targets), outputs, targets)
                if more is not None:
                    more.add(outputs, targets)
            else:
                sums.add_nothing(inputs.device)
            if interruption:
                return None
    finally:
        module.train(modes[0]), loss.train(modes[1])
    further = {} if more is None else more.means(reduce)
    return sums.means(prefix) | {f"{prefix}_{name}": value for name, value in further.items()}


Average = Literal["probabilities", "logits"]
Batch = tuple[Tensor, Tensor]  # outputs, targets


@dataclass(frozen=True)
class Report:
    """Metrics of a test (`test_...`), and the confusion matrix [K, K] with a row per true class (None: regression)."""

    metrics: dict[str, float]
    confusion: Tensor | None


def combine(members: Sequence[Sequence[Batch]], average: Average) -> list[Batch]:
    """The mean over models that were tested on the same samples. That of one model is its outputs themselves."""
    if len(members) == 1:
        return list(members[0])
    result = []
    for batches in zip(*members, strict=True):
        mean = Mean(average)
        for outputs, _ in batches:
            mean.add(outputs, 1 / len(members))
        result.append((mean.outputs, batches[0][1]))
    return result


def report(batches: Sequence[Batch], loss: nn.Module, classes: int | None) -> Report:
    """The metrics of outputs; loss and accuracy are computed as those of a run."""
    sums = MetricSum(classes is not None)
    with torch.inference_mode():
        loss.eval()
        for outputs, targets in batches:
            sums.add(loss(outputs, targets), outputs, targets)
    means = sums.means("test")
    outputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    if classes is None:
        more = {"r2": determination(outputs, targets), "mae": absolute_error(outputs, targets)}
        return Report(means | {f"test_{name}": value for name, value in more.items()}, None)
    confusion = confusion_matrix(targets, outputs.argmax(1), classes)
    if classes > 5:
        means["test_top5_accuracy"] = top_accuracy(outputs, targets, 5)
    means["test_macro_f1"] = f1_scores(confusion).nanmean().item()
    means["test_calibration_error"] = calibration_error(probabilities(outputs, loss), targets)
    return Report(means, confusion.cpu())


class Mean:
    """A weighted mean of outputs; of probabilities it is kept, and given back, as logarithms."""

    def __init__(self, average: Average) -> None:
        self._average = average
        self._sum: Tensor | None = None

    def add(self, outputs: Tensor, weight: float) -> None:
        if self._average == "logits":
            self._sum = outputs * weight if self._sum is None else self._sum.add_(outputs, alpha=weight)
        else:
            term = outputs.log_softmax(1) + math.log(weight)
            self._sum = term if self._sum is None else torch.logaddexp(self._sum, term)

    @property
    def outputs(self) -> Tensor:
        assert self._sum is not None
        return self._sum


def check_same_samples(members: Sequence[Mapping[str, Any]]) -> None:
    """Raises `UserError` unless all `members` ({path, classes, batches}) were tested on the same samples."""
    first = members[0]
    for other in members[1:]:
        if other["classes"] != first["classes"]:
            raise UserError(f"checkpoint={other['path']}: its classes are not those of {first['path']}")
        same = len(other["batches"]) == len(first["batches"]) and all(
            torch.equal(a, b) for (_, a), (_, b) in zip(other["batches"], first["batches"], strict=True)
        )
        if not same:
            raise UserError(f"checkpoint={other['path']}: its test set is not that of {first['path']}")


Validate = Callable[[Interruption], dict[str, float] | None]
"""The metrics of the validation set; None where it was interrupted."""


def reduction(workload: Workload) -> Reduce | None:
    """How sums over a batch become those over all processes' parts of it."""
    return workload.parallel.sum_over_ranks if workload.parallel.processes > 1 else None


def validation(
    workload: Workload,
    optimizer: torch.optim.Optimizer,
    average: ExponentialAverage | None,
    evaluating: Callable[[int, int], None],
) -> Validate | None:
    """The validation of the model, or of its average; None where there is no validation set.

    `evaluating` is told the batches done and all of them.
    """
    samples, early = workload.dataset.val, "monitor" in workload.experiment.stopping.arguments
    if samples is None:
        if early:
            raise UserError("stopping=early: there is no validation set; set data.val_split=0.1 or stopping=none")
        return None
    further = extra_metrics(workload.experiment, workload.dataset, workload.loss)
    module, model = workload.module, workload.precision.autocast(workload.model)
    batches = evaluation_batches(workload, samples)

    def shown() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches.epoch(0), 1):
            yield batch
            evaluating(number, len(batches))

    def validate(interruption: Interruption) -> dict[str, float] | None:
        with at_evaluation_point(optimizer, average), norm_statistics(workload, module, model, interruption):
            return evaluate(
                module,
                model,
                shown(),
                workload.loss,
                classify=workload.classify,
                prefix="val",
                interruption=workload.parallel.evaluation_stop(interruption),
                reduce=reduction(workload),
                more=further and further(),
            )

    return validate


Reader = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # (model, inputs) -> outputs


def test_metrics(workload: Workload) -> dict[str, Any]:
    """test_loss and, in a classification, test_accuracy of the model as it stands; {} where there is no test set."""
    if workload.dataset.test is None:
        return {}
    if workload.experiment.settings.evaluate.tta != "none":
        return _metrics_with_tta(workload)
    batches = evaluation_batches(workload, workload.dataset.test)
    model = workload.precision.autocast(workload.model)
    with norm_statistics(workload, workload.module, model):
        metrics = evaluate(
            workload.module,
            model,
            batches.epoch(0),
            workload.loss,
            classify=workload.classify,
            prefix="test",
            reduce=reduction(workload),
        )
    assert metrics is not None
    return metrics


def check_tta(workload: Workload) -> None:
    """Raises `UserError` where the final test cannot average over the views that `evaluate.tta` asks for."""
    wanted = workload.experiment.settings.evaluate.tta
    if wanted == "none" or workload.dataset.test is None:
        return
    if workload.parallel.processes > 1:
        raise UserError(
            f"evaluate.tta={wanted}: not supported in the final test of {workload.parallel.processes} processes; "
            f"use evaluate.tta=none, then dlopt eval tta={wanted}"
        )
    _plan_of(workload, CHOICES[wanted](), workload.dataset.test)


def _metrics_with_tta(workload: Workload) -> dict[str, Any]:
    settings = workload.experiment.settings.evaluate
    average = choose_average(settings.average if workload.classify else None, workload)
    outputs = outputs_on_test_set(workload, CHOICES[settings.tta](), average)
    metrics = report(outputs, workload.loss, workload.dataset.outputs if workload.classify else None).metrics
    return {name: metrics[name] for name in ("test_loss", "test_accuracy") if name in metrics}


def choose_average(typed: Average | None, workload: Workload) -> Average:
    """What is averaged where nothing was typed: probabilities; the outputs as they are, where they estimate the
    targets themselves (a squared error)."""
    if workload.classify and not isinstance(workload.loss, MSE):
        return typed or "probabilities"
    if typed == "probabilities":
        raise UserError("average=probabilities: this model was trained by squared errors; use average=logits")
    return "logits"


def outputs_on_test_set(
    workload: Workload, choice: Flip | ShiftFlip | TenCrop | MultiScaleTenCrop | None, average: Average
) -> list[Batch]:
    """Outputs (fp32 or fp64, on the device) and targets of the whole test set in its order, batch by batch.

    choice: the views whose outputs are averaged; None: the images as in `dlopt train`'s own test.
    """
    samples = workload.dataset.test
    if samples is None:
        raise UserError(f"data={workload.experiment.data.target.__name__}: this dataset has no test set")
    model = workload.precision.autocast(workload.model)
    with norm_statistics(workload, workload.module, model):
        if choice is None:
            return _outputs(workload.module, model, evaluation_batches(workload, samples), _as_they_are)
        plan = _plan_of(workload, choice, samples)
        batches = _image_batches(workload, samples, plan)
        try:
            return _outputs(workload.module, model, batches, _averaged(workload, plan, average))
        finally:
            batches.close()


def _as_they_are(model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return model(inputs)


def _averaged(workload: Workload, plan: Plan, average: Average) -> Reader:
    def read(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        mean = Mean(average)
        for weight, view in plan.views(images):
            mean.add(_promoted(model(_normalized(workload, view))), weight)
        return mean.outputs

    return read


@torch.inference_mode()
def _outputs(module: nn.Module, model: Callable[[Tensor], Tensor], batches: Batches, read: Reader) -> list[Batch]:
    module.eval()
    return [(_promoted(read(model, inputs)), targets) for inputs, targets in batches.epoch(0)]


def _promoted(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _normalized(workload: Workload, view: Tensor) -> Tensor:
    inputs: Tensor = workload.normalize(view)
    return inputs.to(dtype=workload.precision.dtype, memory_format=workload.memory_format)


@torch.inference_mode()
def _plan_of(workload: Workload, choice: Any, samples: Samples) -> Plan:
    """The views for these samples. Raises `UserError` when they are no images or the model does not take the crops."""
    if len(samples.shape) != 3:
        data = workload.experiment.data.target.__name__
        raise UserError(f"tta: the samples of data={data} are not images; use tta=none")
    channels, *image = samples.shape
    shape = samples.shape if workload.augment is None else workload.augment.output_shape
    plan: Plan = choice.views((shape[1], shape[2]), (image[0], image[1]))
    if plan.size != tuple(shape[1:]):
        probe = torch.zeros(2, channels, *plan.size, device=workload.device)
        workload.module.eval()
        try:
            workload.module(_normalized(workload, probe))
        except (RuntimeError, UserError):
            raise UserError(
                f"tta.crop={plan.size[0]}: this model, or its normalization, takes images of {shape[1]}x{shape[2]} only"
            ) from None
    return plan


def _image_batches(workload: Workload, samples: Samples, plan: Plan) -> Batches:
    """Batches of images before the normalization. Files are decoded at the largest size that a view wants."""
    experiment, in_memory = workload.experiment, workload.dataset.in_memory
    data = experiment.data_settings
    if isinstance(samples, Files) and data.image_size is not None and min(plan.image) > min(samples.shape[1:]):
        larger = replace(data, image_size=plan.image, memory=False)
        source: Dataset = experiment.data.build(**vars(larger))
        found = prepare(source, larger).test
        assert found is not None
        samples, in_memory = found, False
    delivery = Delivery(workload.device, in_memory, data.workers, dtype=workload.precision.dtype)
    return Batches(samples, delivery, batch_size=data.batch_size)
