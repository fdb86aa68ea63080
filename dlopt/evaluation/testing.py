"""Testing one model or an ensemble on a test set, with one view of each sample or with several."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlopt.assembly.batches import evaluation_batches
from dlopt.assembly.norms import norm_statistics
from dlopt.assembly.setup import Setup
from dlopt.data.batches import Batches
from dlopt.data.samples import Dataset, Files, Samples
from dlopt.data.splits import prepare
from dlopt.engine.metrics import Sums
from dlopt.errors import UserError
from dlopt.evaluation import figures
from dlopt.evaluation.tta import Flip, MultiScaleTenCrop, Plan, ShiftFlip, TenCrop
from dlopt.losses import MSE, probabilities

Average = Literal["probabilities", "logits"]
Batch = tuple[Tensor, Tensor]  # outputs, targets


@dataclass(frozen=True)
class Report:
    """Figures of a test (`test_...`), and the confusion matrix [K, K] with a row per true class (None: regression)."""

    figures: dict[str, float]
    confusion: Tensor | None


def choose_average(typed: Average | None, setup: Setup) -> Average:
    """What is averaged where nothing was typed: probabilities; the outputs as they are, where they estimate the
    targets themselves (a squared error)."""
    if setup.classify and not isinstance(setup.loss, MSE):
        return typed or "probabilities"
    if typed == "probabilities":
        raise UserError("average=probabilities: this model was trained by squared errors; use average=logits")
    return "logits"


def outputs_on_test_set(
    setup: Setup, choice: Flip | ShiftFlip | TenCrop | MultiScaleTenCrop | None, average: Average
) -> list[Batch]:
    """Outputs (fp32 or fp64, on the device) and targets of the whole test set in its order, batch by batch.

    choice: the views whose outputs are averaged; None: the images as in `dlopt train`'s own test.
    """
    samples = setup.dataset.test
    if samples is None:
        raise UserError(f"data={setup.experiment.data.target.__name__}: this dataset has no test set")
    model = setup.precision.autocast(setup.model)
    with norm_statistics(setup, setup.module, model):
        if choice is None:
            return _outputs(setup.module, model, evaluation_batches(setup, samples), _as_they_are)
        plan = plan_of(setup, choice, samples)
        batches = _image_batches(setup, samples, plan)
        try:
            return _outputs(setup.module, model, batches, _averaged(setup, plan, average))
        finally:
            batches.close()


def combine(members: Sequence[Sequence[Batch]], average: Average) -> list[Batch]:
    """The mean over models that were tested on the same samples. That of one model is its outputs themselves."""
    if len(members) == 1:
        return list(members[0])
    result = []
    for batches in zip(*members, strict=True):
        mean = _Mean(average)
        for outputs, _ in batches:
            mean.add(outputs, 1 / len(members))
        result.append((mean.outputs, batches[0][1]))
    return result


def report(batches: Sequence[Batch], loss: nn.Module, classes: int | None) -> Report:
    """The figures of outputs; loss and accuracy are computed as those of a run."""
    sums = Sums(classes is not None)
    with torch.inference_mode():
        loss.eval()
        for outputs, targets in batches:
            sums.add(loss(outputs, targets), outputs, targets)
    means = sums.means("test")
    outputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    if classes is None:
        more = {"r2": figures.determination(outputs, targets), "mae": figures.absolute_error(outputs, targets)}
        return Report(means | {f"test_{name}": value for name, value in more.items()}, None)
    confusion = figures.confusion_matrix(targets, outputs.argmax(1), classes)
    if classes > 5:
        means["test_top5_accuracy"] = figures.top_accuracy(outputs, targets, 5)
    means["test_macro_f1"] = figures.f1_scores(confusion).nanmean().item()
    means["test_calibration_error"] = figures.calibration_error(probabilities(outputs, loss), targets)
    return Report(means, confusion.cpu())


class _Mean:
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


Reader = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # (model, inputs) -> outputs


def _as_they_are(model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return model(inputs)


def _averaged(setup: Setup, plan: Plan, average: Average) -> Reader:
    def read(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        mean = _Mean(average)
        for weight, view in plan.views(images):
            mean.add(_promoted(model(_normalized(setup, view))), weight)
        return mean.outputs

    return read


@torch.inference_mode()
def _outputs(module: nn.Module, model: Callable[[Tensor], Tensor], batches: Batches, read: Reader) -> list[Batch]:
    module.eval()
    return [(_promoted(read(model, inputs)), targets) for inputs, targets in batches.epoch(0)]


def _promoted(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _normalized(setup: Setup, view: Tensor) -> Tensor:
    inputs: Tensor = setup.normalize(view)
    return inputs.to(dtype=setup.precision.dtype, memory_format=setup.memory_format)


@torch.inference_mode()
def plan_of(setup: Setup, choice: Any, samples: Samples) -> Plan:
    """The views for these samples. Raises `UserError` when they are no images or the model does not take the crops."""
    if len(samples.shape) != 3:
        raise UserError(f"tta: the samples of data={setup.experiment.data.target.__name__} are no images; use tta=none")
    channels, *image = samples.shape
    shape = samples.shape if setup.augment is None else setup.augment.output_shape
    plan: Plan = choice.views((shape[1], shape[2]), (image[0], image[1]))
    if plan.size != tuple(shape[1:]):
        probe = torch.zeros(2, channels, *plan.size, device=setup.device)
        setup.module.eval()
        try:
            setup.module(_normalized(setup, probe))
        except (RuntimeError, UserError):
            raise UserError(
                f"tta.crop={plan.size[0]}: this model, or its normalization, takes images of {shape[1]}x{shape[2]} only"
            ) from None
    return plan


def _image_batches(setup: Setup, samples: Samples, plan: Plan) -> Batches:
    """Batches of images before the normalization. Files are decoded at the largest size that a view wants."""
    experiment, in_memory = setup.experiment, setup.dataset.in_memory
    data = experiment.data_settings
    if isinstance(samples, Files) and data.image_size is not None and min(plan.image) > min(samples.shape[1:]):
        larger = replace(data, image_size=plan.image, memory=False)
        source: Dataset = experiment.data.build(**vars(larger))
        found = prepare(source, larger).test
        assert found is not None
        samples, in_memory = found, False
    return Batches(
        samples,
        batch_size=data.batch_size,
        device=setup.device,
        workers=data.workers,
        in_memory=in_memory,
        dtype=setup.precision.dtype,
    )


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
