"""Batches of an experiment's samples: shuffled and augmented for training, as they are for evaluation."""

from typing import Any

from dlopt.assembly import speed
from dlopt.assembly.setup import Setup
from dlopt.assembly.streams import AUGMENTATION, ORDER
from dlopt.augment.crop import CentreCrop
from dlopt.data.batches import Batches
from dlopt.data.samples import Samples
from dlopt.random import stream

_EVALUATED_AT_ONCE = 1024  # samples on a GPU at least: smaller batches are bound by launching kernels


def training_batches(setup: Setup) -> Batches:
    experiment, dataset = setup.experiment, setup.dataset
    settings = experiment.settings
    sampler = experiment.sampler.build(
        targets=dataset.train.targets,
        samples=dataset.train,
        batch_size=experiment.data_settings.batch_size,
        seed=stream(settings.order_seed, ORDER),
    )
    drop_last = experiment.data_settings.drop_last
    seed = stream(settings.augmentation_seed, AUGMENTATION)
    augment, share = setup.parallel.augmented(setup.augment), setup.parallel.share
    return _batches(
        setup,
        dataset.train,
        batch_size=experiment.data_settings.batch_size,
        sampler=sampler,
        augment=augment,
        seed=seed,
        drop_last=drop_last,
        share=share,
        compiled=setup.device.type == "cuda" and not setup.uncompiled,
        recorder=speed.recorder(experiment, setup.device),
    )


def evaluation_batches(setup: Setup, samples: Samples, *, shared: bool = True) -> Batches:
    """The samples as they are, or their centre where the training sees a smaller window of them.

    `shared`: each process has its part of them; else each has all.
    """
    shape = samples.shape if setup.augment is None else setup.augment.output_shape
    share = setup.parallel.share_evaluation if shared else None
    size = setup.experiment.data_settings.batch_size
    if shared and setup.device.type == "cuda" and setup.dataset.in_memory and size != "full":
        size = max(size, _EVALUATED_AT_ONCE)
    augment = None if shape == samples.shape else CentreCrop(shape)
    return _batches(setup, samples, batch_size=size, augment=augment, share=share)


def _batches(setup: Setup, samples: Samples, **training: Any) -> Batches:
    data = setup.experiment.data_settings
    return Batches(
        samples,
        device=setup.device,
        workers=data.workers,
        in_memory=setup.dataset.in_memory,
        normalize=setup.normalize,
        memory_format=setup.memory_format,
        dtype=setup.precision.dtype,
        **training,
    )
