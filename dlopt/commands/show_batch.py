"""`dlopt show-batch`: pictures of what an augmentation does to images of the chosen data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dlopt.commands.line import output_folder, own_keys, read_line, refuse_several
from dlopt.config.compose import to_plain
from dlopt.errors import UserError
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from dlopt.config.experiment import Experiment

USAGE = """\
dlopt show-batch [group=choice] [key=value] [output=FILE]: draws what an augmentation does to images

  dlopt show-batch data=cifar10 augmentation=randaugment
  dlopt show-batch augmentation=affine seed=3 output=affine.png

Two pictures: FILE has a row per image, the original and what the pipeline makes of it in six steps; beside it stands
FILE's name with _operations: a row per operation at low, middle and high strength.
Without output= they go to outputs/show-batch/<date>_<time>/. The keys are those of `dlopt train`.
"""

_IMAGES = 8

_ONE = "one batch is shown at a time"


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The keys of this command alone."""

    output: str | None = None


def show_batch(arguments: list[str]) -> int:
    """Draws both pictures and prints where they are. Raises `UserError`."""
    line = read_line(arguments, USAGE, several=_ONE)
    if line is None:
        return 0
    from dlopt.config.parsing import parse

    composer = line.composer()
    own, overrides = own_keys(composer, line.overrides, _Own)
    refuse_several(composer, overrides, _ONE)
    target = None if own.output is None else _target(own.output)
    experiment = parse(*to_plain(composer.compose(overrides), overrides))
    batch, operations = _draw(experiment)
    if target is None:
        target = output_folder(None, "show-batch") / "batch.png"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        batch.save(target)
        print(short_path(target))
        if operations is not None:
            beside = target.with_stem(f"{target.stem}_operations")
            operations.save(beside)
            print(short_path(beside))
    except OSError as error:
        raise UserError(f"output={target}: the picture cannot be written there: {error.strerror or error}") from None
    if operations is None:
        print("this augmentation has no operations: the images are used as they are")
    return 0


def _target(output: str) -> Path:
    from PIL import Image

    path = Path(output)
    if path.is_dir() or not path.name:
        raise UserError(f"output={output}: this is a folder; name a file in it, such as {path / 'batch.png'}")
    if not path.suffix:
        path = path.with_suffix(".png")
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"output={output}: pictures cannot be written as {path.suffix}; use .png")
    return path


def _draw(experiment: "Experiment") -> tuple["Image", "Image | None"]:
    """The batch, and the operations where there are any, of images drawn evenly at random with `order_seed`."""
    from dlopt.augment import Pipeline
    from dlopt.augment.show import batch_picture, operations_picture
    from dlopt.data.samples import Dataset
    from dlopt.data.splits import prepare
    from dlopt.random import generator

    settings = experiment.settings
    source: Dataset = experiment.data.build(**vars(experiment.data_settings))
    dataset = prepare(source, replace(experiment.data_settings, memory=False))  # a few images are enough
    train = dataset.train
    order = torch.randperm(len(train), generator=generator("cpu", settings.order_seed))[:_IMAGES]
    images, targets = train.fetch(order), train.targets[order]
    if images.ndim != 4:
        raise UserError(f"data={experiment.data.target.__name__}: its samples are vectors; only images can be shown")
    classes = None if dataset.classes is None else len(dataset.classes)
    pipeline: Pipeline = experiment.augmentation.build(input_shape=train.shape, classes=classes, train=train)
    batch = batch_picture(pipeline, images, targets, seed=settings.augmentation_seed)
    return batch, operations_picture(pipeline, images) if pipeline.operations else None
