"""The model of a set-up on its test set, with one view of each sample or with several."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.assembly.batches import evaluation_batches
from dlopt.assembly.norms import norm_statistics
from dlopt.assembly.setup import Setup
from dlopt.assembly.validation import reduction
from dlopt.data.batches import Batches
from dlopt.data.samples import Dataset, Files, Samples
from dlopt.data.splits import prepare
from dlopt.engine.evaluate import evaluate
from dlopt.errors import UserError
from dlopt.evaluation.testing import Average, Batch, Mean, report
from dlopt.evaluation.tta import CHOICES, Flip, MultiScaleTenCrop, Plan, ShiftFlip, TenCrop
from dlopt.losses import MSE

Reader = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # (model, inputs) -> outputs


def test_figures(setup: Setup) -> dict[str, Any]:
    """test_loss and, in a classification, test_accuracy of the model as it stands; {} where there is no test set."""
    if setup.dataset.test is None:
        return {}
    if setup.experiment.settings.evaluate.tta != "none":
        return _figures_over_views(setup)
    batches = evaluation_batches(setup, setup.dataset.test)
    model = setup.precision.autocast(setup.model)
    with norm_statistics(setup, setup.module, model):
        figures = evaluate(
            setup.module,
            model,
            batches.epoch(0),
            setup.loss,
            classify=setup.classify,
            prefix="test",
            reduce=reduction(setup),
        )
    assert figures is not None
    return figures


def check_views(setup: Setup) -> None:
    """Raises `UserError` where the final test cannot average over the views that `evaluate.tta` asks for."""
    wanted = setup.experiment.settings.evaluate.tta
    if wanted == "none" or setup.dataset.test is None:
        return
    if setup.parallel.processes > 1:
        raise UserError(
            f"evaluate.tta={wanted}: the final test of {setup.parallel.processes} processes takes the images as they "
            f"are; use evaluate.tta=none, and then dlopt eval tta={wanted}"
        )
    _plan_of(setup, CHOICES[wanted](), setup.dataset.test)


def _figures_over_views(setup: Setup) -> dict[str, Any]:
    settings = setup.experiment.settings.evaluate
    average = choose_average(settings.average if setup.classify else None, setup)
    outputs = outputs_on_test_set(setup, CHOICES[settings.tta](), average)
    figures = report(outputs, setup.loss, setup.dataset.outputs if setup.classify else None).figures
    return {name: figures[name] for name in ("test_loss", "test_accuracy") if name in figures}


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
        plan = _plan_of(setup, choice, samples)
        batches = _image_batches(setup, samples, plan)
        try:
            return _outputs(setup.module, model, batches, _averaged(setup, plan, average))
        finally:
            batches.close()


def _as_they_are(model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return model(inputs)


def _averaged(setup: Setup, plan: Plan, average: Average) -> Reader:
    def read(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        mean = Mean(average)
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
def _plan_of(setup: Setup, choice: Any, samples: Samples) -> Plan:
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
