"""Batches of an experiment's samples: shuffled and augmented for training, as they are for evaluation."""

from typing import Any

from dlopt.assembly.setup import Setup
from dlopt.assembly.streams import AUGMENTATION, ORDER
from dlopt.augment.crop import CentreCrop
from dlopt.data.batches import Batches
from dlopt.data.samples import Samples
from dlopt.random import stream


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
    return _batches(setup, dataset.train, sampler=sampler, augment=augment, seed=seed, drop_last=drop_last, share=share)


def evaluation_batches(setup: Setup, samples: Samples, *, shared: bool = True) -> Batches:
    """The samples as they are, or their centre where the training sees a smaller window of them.

    `shared`: each process has its part of them; else each has all.
    """
    shape = samples.shape if setup.augment is None else setup.augment.output_shape
    share = setup.parallel.share_evaluation if shared else None
    return _batches(setup, samples, augment=None if shape == samples.shape else CentreCrop(shape), share=share)


def _batches(setup: Setup, samples: Samples, **training: Any) -> Batches:
    data = setup.experiment.data_settings
    return Batches(
        samples,
        batch_size=data.batch_size,
        device=setup.device,
        workers=data.workers,
        in_memory=setup.dataset.in_memory,
        normalize=setup.normalize,
        memory_format=setup.memory_format,
        dtype=setup.precision.dtype,
        **training,
    )
