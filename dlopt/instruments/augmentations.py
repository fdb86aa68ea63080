"""Draws training images before and after augmentation."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from dlopt.augment import Pipeline
from dlopt.augment.show import batch_picture, operations_picture, reading_crops
from dlopt.basics.errors import UserError
from dlopt.basics.random import generator
from dlopt.config.run_config import RunConfig
from dlopt.data.samples import Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGES = 8


def draw(run_configs: Mapping[str, RunConfig], dataset: Dataset, tile: int) -> tuple["Image", "Image | None"]:
    """Plots random training images (`order_seed`), and the operations of a single augmentation that has any.

    `run_configs`: by the name of their augmentation, in which alone they differ; `tile`: size of an image in pixels.
    Raises `UserError` for data that are not images.
    """
    run_config = next(iter(run_configs.values()))
    settings, train, task = run_config.settings, dataset.train, dataset.task
    order = torch.randperm(len(train), generator=generator("cpu", settings.order_seed))[:_IMAGES]
    images, seed = train.fetch(order), settings.augmentation_seed
    if images.ndim != 4:
        raise UserError(f"data={run_config.data.target.__name__}: not images but vectors; cannot be plotted")
    pipelines: dict[str, Pipeline] = {
        label: each.augmentation.build(input_shape=train.shape, train=train, **task.target_arguments)
        for label, each in run_configs.items()
    }
    name = run_config.config["data"]["_target_"].rpartition(".")[2]
    batch = batch_picture(
        {label: reading_crops(pipeline, train, order, seed) for label, pipeline in pipelines.items()},
        images,
        train.targets[order],
        seed=seed,
        classes=[str(each) for each in dataset.classes or ()],
        title=f"{name}: training images before and after augmentation",
        tile=tile,
        white=task.white,
    )
    [*others, (label, pipeline)] = pipelines.items()
    if others or not pipeline.operations:
        return batch, None
    title = f"augmentation={label}: its operations"
    return batch, operations_picture(pipeline, images, title=title, tile=tile, white=task.white)
