"""Pictures of what a pipeline does: each of its operations by strength, and its results beside the originals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlopt.augment.operation import Draws, Graded, Operation, Shape, image_shape
from dlopt.augment.pipeline import Pipeline
from dlopt.random import generator

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = {"low": (1 / 3, 1.0), "middle": (2 / 3, 1.0), "high": (1.0, 1.0), "high, other side": (1.0, -1.0)}
"""Strength and sign of the columns of `operations_picture`."""

_TILE = 112  # pixels
_GAP = 4
_LINE = 18


def operations_picture(pipeline: Pipeline, images: Tensor) -> "Image":
    """A row per operation of the pipeline: the original, then the operation at a third, two thirds and all of its
    strength, and at all of it to the other side (translations, brightness; a one-sided operation shows the same).

    Args:
        pipeline: operations that choose among others show each of these.
        images: uint8 [n, C, H, W]; rows show image 0, 1, 2, ... in turn, and mixing needs at least two.
    """
    shape = image_shape(images.shape[1:])
    operations = [part for operation in pipeline.operations for part in _parts(operation, shape)]
    rows, labels = [], []
    for i, operation in enumerate(operations):
        batch = images.roll(-(i % len(images)), 0)
        alone = Pipeline(operations=[operation], border=pipeline.border, input_shape=shape)
        row = [batch[0]]
        for epoch, (strength, sign) in enumerate(COLUMNS.values()):
            draws = Draws(generator(images.device, 0), len(batch), indices=_numbers(batch), epoch=epoch)
            targets = torch.zeros(len(batch), device=images.device)
            row.append(alone.apply(batch, targets, Graded(draws, strength, sign), slice(None))[0][0])
        rows.append(row)
        labels.append(type(operation).__name__)
    return _picture(rows, labels, ["original", *COLUMNS])


def batch_picture(pipeline: Pipeline, images: Tensor, targets: Tensor, *, seed: int, draws: int = 6) -> "Image":
    """A row per image [n, C, H, W]: the original, then what the pipeline makes of it in `draws` steps."""
    results = []
    for step in range(draws):
        results.append(
            pipeline(
                images,
                targets,
                generator=generator(images.device, seed, step),
                total=len(images),
                part=slice(0, len(images)),
                indices=_numbers(images),
                epoch=step,
            )[0]
        )
    rows = [[image, *(result[i] for result in results)] for i, image in enumerate(images)]
    return _picture(rows, None, ["original", *(f"step {step + 1}" for step in range(draws))])


def _parts(operation: Operation, shape: Shape) -> list[Operation]:
    parts = operation.parts(shape)
    if parts == [operation]:
        return parts
    return [leaf for part in parts for leaf in _parts(part, shape)]


def _numbers(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device)


def _picture(rows: Sequence[Sequence[Tensor]], labels: Sequence[str] | None, heads: Sequence[str]) -> "Image":
    from PIL import Image, ImageDraw

    left = 130 if labels else _GAP
    cell = _TILE + _GAP
    picture = Image.new("RGB", (left + cell * len(heads), _LINE + cell * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for column, head in enumerate(heads):
        pen.text((left + column * cell, 3), head, fill="black")
    for y, row in enumerate(rows):
        if labels:
            pen.text((_GAP, _LINE + y * cell + _TILE // 2 - 6), labels[y], fill="black")
        for column, image in enumerate(row):
            picture.paste(_tile(image), (left + column * cell, _LINE + y * cell))
    return picture


def _tile(image: Tensor) -> "Image":
    from PIL import Image

    if len(image) not in (1, 3):
        image = image[:1]
    pixels = image.float().round().clamp(0, 255).byte().cpu().permute(1, 2, 0).numpy()
    tile = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    small = max(tile.size) <= _TILE // 2
    scale = _TILE / max(tile.size)
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    return tile.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR)
