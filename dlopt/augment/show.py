"""Images of a pipeline's effects: each operation by strength, and augmented samples next to the originals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlopt.augment.operation import Draws, FixedStrengthDraws, Operation, Shape, image_shape
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
    """Draws a row per operation: the original, then the operation at 1/3, 2/3 and full strength.

    The last column has full strength with the opposite sign (translation, brightness); one-sided operations repeat.

    Args:
        pipeline: of an operation that chooses from others, all choices are shown.
        images: uint8 [n, C, H, W]; the rows show image 0, 1, 2, ... in turn; mixing needs at least two images.
    """
    shape = image_shape(images.shape[1:])
    operations = [leaf for operation in pipeline.operations for leaf in _leaves(operation, shape)]
    rows, labels = [], []
    for i, operation in enumerate(operations):
        batch = images.roll(-(i % len(images)), 0)
        single = Pipeline(operations=[operation], border=pipeline.border, input_shape=shape)
        row = [batch[0]]
        for epoch, (strength, sign) in enumerate(COLUMNS.values()):
            indices = torch.arange(len(batch), device=images.device)
            draws = Draws(generator(images.device, 0), len(batch), indices=indices, epoch=epoch)
            targets = torch.zeros(len(batch), device=images.device)
            row.append(single.apply(batch, targets, FixedStrengthDraws(draws, strength, sign))[0][0])
        rows.append(row)
        labels.append(type(operation).__name__)
    return _grid(rows, labels, ["original", *COLUMNS])


def batch_picture(pipeline: Pipeline, images: Tensor, targets: Tensor, *, seed: int, draws: int = 6) -> "Image":
    """Draws a row per image [n, C, H, W]: the original, then its augmented versions in `draws` steps."""
    indices = torch.arange(len(images), device=images.device)
    results = []
    for step in range(draws):
        results.append(
            pipeline(
                images,
                targets,
                generator=generator(images.device, seed, step),
                total=len(images),
                shard=slice(0, len(images)),
                indices=indices,
                epoch=step,
            )[0]
        )
    rows = [[image, *(result[i] for result in results)] for i, image in enumerate(images)]
    return _grid(rows, None, ["original", *(f"step {step + 1}" for step in range(draws))])


def _leaves(operation: Operation, shape: Shape) -> list[Operation]:
    choices = operation.choices(shape)
    if choices == [operation]:
        return choices
    return [leaf for choice in choices for leaf in _leaves(choice, shape)]


def _grid(rows: Sequence[Sequence[Tensor]], labels: Sequence[str] | None, headers: Sequence[str]) -> "Image":
    from PIL import Image, ImageDraw

    left = 130 if labels else _GAP
    cell = _TILE + _GAP
    picture = Image.new("RGB", (left + cell * len(headers), _LINE + cell * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for column, header in enumerate(headers):
        pen.text((left + column * cell, 3), header, fill="black")
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
