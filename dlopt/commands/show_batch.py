"""`dlopt show-batch`: plots augmented images."""

from pathlib import Path
from typing import TYPE_CHECKING

from dlopt.commands.command import Line, on_experiment, output_folder, read_dataset, refuse_folder, writing
from dlopt.errors import DONE, UserError
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from dlopt.config.experiment import Experiment

USAGE = """\
Plot augmented images

Usage: dlopt show-batch [group=choice] [key=value]

Examples:
  dlopt show-batch data=cifar10 augmentation=randaugment
  dlopt show-batch augmentation=affine seed=3 output=affine.png

Saves two plots: NAME.png has a row per image, the original and six augmented versions; NAME_operations.png has a row
per operation at low, medium and high strength.

  output=FILE       plot of the batch (default: outputs/show-batch/DATE_TIME/batch.png)
  and the keys of `dlopt train`
"""

_IMAGES = 8


@on_experiment(USAGE, several="show-batch plots one batch at a time", one=True)
def show_batch(line: Line, *, output: str | None = None) -> int:
    """Saves both plots and prints their paths. Raises `UserError`."""
    target = None if output is None else _target(output)
    batch, operations = _draw(line.experiment()[0])
    if target is None:
        target = output_folder(None, "show-batch") / "batch.png"
    operations_target = target.with_stem(f"{target.stem}_operations")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        batch.save(target)
        if operations is not None:
            operations.save(operations_target)
    print(short_path(target))
    if operations is None:
        print("this augmentation has no operations")
    else:
        print(short_path(operations_target))
    return DONE


def _target(output: str) -> Path:
    from PIL import Image

    path = refuse_folder(Path(output), f" such as {Path(output) / 'batch.png'}")
    if not path.suffix:
        path = path.with_suffix(".png")
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"output={output}: unknown image format {path.suffix}; use .png")
    return path


def _draw(experiment: "Experiment") -> tuple["Image", "Image | None"]:
    """Plots random training images (`order_seed`), and the operations if the augmentation has any."""
    import torch

    from dlopt.augment import Pipeline
    from dlopt.augment.show import batch_picture, operations_picture
    from dlopt.random import generator

    settings, dataset = experiment.settings, read_dataset(experiment)
    train = dataset.train
    order = torch.randperm(len(train), generator=generator("cpu", settings.order_seed))[:_IMAGES]
    images, targets = train.fetch(order), train.targets[order]
    if images.ndim != 4:
        raise UserError(f"data={experiment.data.target.__name__}: not images but vectors; cannot be plotted")
    pipeline: Pipeline = experiment.augmentation.build(
        input_shape=train.shape, classes=dataset.task.classes, train=train
    )
    batch = batch_picture(pipeline, images, targets, seed=settings.augmentation_seed)
    return batch, operations_picture(pipeline, images) if pipeline.operations else None
