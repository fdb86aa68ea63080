"""Builds the batches of a workload: sampled and augmented for training, plain and complete for evaluation."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from dlopt.augment.operation import image_shape, leaves
from dlopt.augment.pipeline import CentreCrop, Pipeline, crop_when_reading
from dlopt.basics.errors import UserError
from dlopt.basics.random import stream
from dlopt.data.batches import Batches, Delivery
from dlopt.data.samplers import BY_SAMPLE, LossAwareSampler, loss_aware, shifted
from dlopt.data.samples import Samples
from dlopt.data.texts.windows import Windows
from dlopt.losses import Distillation
from dlopt.models.known import treats_samples_alone
from dlopt.training.builders import speed
from dlopt.training.builders.further import names_of, reader
from dlopt.training.builders.workload import Workload, build_sampler
from dlopt.training.rng import AUGMENTATION, ORDER

_MIN_EVALUATION_BATCH = 1024  # on a GPU, where kernel launches limit the speed of smaller batches


def training_batches(workload: Workload) -> Batches:
    """Returns the sampled and augmented training batches of this rank."""
    run_config, samples, split = workload.run_config, workload.dataset.train, workload.parallel.split
    settings, data = run_config.settings, run_config.data_settings
    sampler = build_sampler(run_config, samples)
    if isinstance(samples, Windows):  # whose places in the text move in every epoch, which no other kind has
        if isinstance(sampler, BY_SAMPLE):
            raise UserError(
                f"{run_config.sampler.choice}: the windows of a text have no labels and change in every epoch; "
                "use sampler=random"
            )
        sampler, samples = shifted(sampler, samples, stream(settings.order_seed, ORDER))
    seed = stream(settings.augmentation_seed, AUGMENTATION)
    reader, augment = crop_when_reading(workload.augment, samples, seed)
    teacher = workload.loss.trained if isinstance(workload.loss, Distillation) else None
    teacher_normalize = None if teacher is None else teacher.normalize
    operations: list[object] = [] if augment is None else [augment]  # a custom augmentation
    if isinstance(augment, Pipeline):  # its operations, at any depth
        image = image_shape(augment.output_shape)
        operations = [leaf for each in augment.operations for leaf in (each, *leaves(each, image))]
    normalizations = [each for each in (workload.normalize, teacher_normalize) if each is not None]
    delivery = _delivery(
        workload,
        compiled=workload.device.type == "cuda" and not workload.compile_obstacle,
        recorder=speed.data_recorder(run_config, workload.device, [*operations, *normalizations]),
        teacher_normalize=teacher_normalize,
    )
    batches = Batches(
        samples,
        delivery,
        batch_size=data.batch_size,
        sampler=sampler,
        drop_last=data.drop_last,
        augment=split.augmentation(augment),
        seed=seed,
        shard=split.shard,
        reader=reader,
        further=workload.further,
    )
    workload.opened.add(batches)
    return batches


def evaluation_batches(
    workload: Workload, samples: Samples, *, shared: bool = True, batch_size: int | Literal["full"] | None = None
) -> Batches:
    """Returns batches without augmentation; images are centre-cropped if training uses a smaller window.

    `shared`: shard the samples over processes; false: every process has all. `batch_size`: None for that of training.
    """
    shape = samples.shape if workload.augment is None else workload.augment.output_shape
    shard = workload.parallel.split.evaluation_shard if shared else None
    size = workload.run_config.data_settings.batch_size if batch_size is None else batch_size
    has_small_outputs = workload.dataset.in_memory and workload.task.tokens is None  # no logits of each token
    if shared and workload.device.type == "cuda" and has_small_outputs and size != "full":
        size = max(size, _MIN_EVALUATION_BATCH)
    augment = None if shape == samples.shape else CentreCrop(shape)
    further = {name: samples.further[name] for name in names_of(workload.loss)}
    batches = Batches(samples, _delivery(workload), batch_size=size, augment=augment, shard=shard, further=further)
    workload.opened.add(batches)
    return batches


def evaluation_model(workload: Workload, batches: Batches) -> Callable[[Tensor], Tensor]:
    """Returns the model in evaluation mode for `batches`.

    If it is compiled, it is called with batches of one size: zeros, whose outputs are dropped, fill the last batch.
    Otherwise the last batches of validation and test set would take a compilation each.
    """
    model = workload.precision.autocast(workload.model)
    if workload.compile_obstacle or not treats_samples_alone(workload.module):
        return model

    def filled(inputs: Tensor) -> Tensor:
        samples = len(inputs)
        if samples >= batches.local_size:
            return model(inputs)
        full = inputs.new_empty(batches.local_size, *inputs.shape[1:])
        if inputs.ndim == 4:
            full = full.to(memory_format=workload.memory_format)
        full[:samples] = inputs
        full[samples:] = 0
        return model(full)[:samples]

    return filled


def _delivery(workload: Workload, **acceleration: Any) -> Delivery:
    return Delivery(
        workload.device,
        in_memory=workload.dataset.in_memory,
        workers=workload.run_config.data_settings.workers,
        task=workload.task,
        normalize=workload.normalize,
        memory_format=workload.memory_format,
        dtype=workload.precision.dtype,
        processes=workload.parallel.ranks.local_processes,
        **acceleration,
    )


def loss_aware_sampler(workload: Workload, batches: Batches) -> LossAwareSampler | None:
    """Returns the sampler of `batches` if it is loss-aware. Raises `UserError`."""
    sampler = loss_aware(batches.sampler)
    if sampler is None:
        return None
    if names_of(workload.loss):
        raise UserError(f"{reader(workload)}, but {workload.run_config.sampler.choice} observes losses; use another")
    # Each rank observes the losses of its own samples only: the sampler merges them before it plans an epoch and before
    # it is saved, on all ranks together.
    sampler.maximum = workload.parallel.ranks.maximum
    return sampler
