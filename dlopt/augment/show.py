"""Images of a pipeline's effects: each operation by strength, and augmented samples next to the originals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from dlopt.augment.operation import Draws, FixedStrengthDraws, image_shape, leaves
from dlopt.augment.pipeline import Pipeline, crop_when_reading
from dlopt.basics.random import generator
from dlopt.data.batches import Augment, Position
from dlopt.data.samples import Samples

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = {"low": (1 / 3, 1.0), "middle": (2 / 3, 1.0), "high": (1.0, 1.0), "high, other side": (1.0, -1.0)}
"""Strength and sign of the columns of `operations_picture`."""

TILE = 112  # pixels
_GAP = 4
_MIXED = 0.995  # weight of a sample's class below which its caption shows the mixture


def operations_picture(
    pipeline: Pipeline, images: Tensor, *, title: str = "", tile: int = TILE, white: float = 255.0
) -> "Image":
    """Draws a row per operation: the original, then the operation at 1/3, 2/3 and full strength.

    The last column has full strength with the opposite sign (translation, brightness); one-sided operations repeat.

    Args:
        pipeline: of an operation that chooses from others, all choices are shown.
        images: [n, C, H, W]; the rows show image 0, 1, 2, ... in turn; mixing needs at least two images.
        tile: size of an image in pixels; the text grows with it.
        white: value of a white pixel.
    """
    shape = image_shape(images.shape[1:])
    operations = [leaf for operation in pipeline.operations for leaf in leaves(operation, shape)]
    rows = []
    for i, operation in enumerate(operations):
        batch = images.roll(-(i % len(images)), 0)
        single = Pipeline(operations=[operation], border=pipeline.border, input_shape=shape)
        row = [batch[0]]
        for epoch, (strength, sign) in enumerate(COLUMNS.values()):
            indices = torch.arange(len(batch), device=images.device)
            draws = Draws(generator(images.device, 0), len(batch), indices=indices, epoch=epoch)
            targets = torch.zeros(len(batch), device=images.device)
            row.append(single.apply(batch, targets, FixedStrengthDraws(draws, strength, sign))[0][0])
        rows.append(_Row(type(operation).__name__, row, [""] * len(row)))
    return _grid(rows, title, [["original", *COLUMNS]], tile, white)


def batch_picture(
    pipelines: Mapping[str, Augment],
    images: Tensor,
    targets: Tensor,
    *,
    seed: int,
    classes: Sequence[str] = (),
    title: str = "",
    draws: int = 6,
    tile: int = TILE,
    white: float = 255.0,
) -> "Image":
    """Draws a row per image: the original, then its augmented versions, by pipeline, in `draws` steps altogether.

    Mixed samples have a caption with the weights of their classes.

    Args:
        pipelines: by name, which is their heading.
        images: [n, C, H, W].
        targets: int64 [n]; float [n, K], 0 or 1, of several labels per sample; or continuous.
        classes: names, the labels of the rows; empty: no labels.
        tile: size of an image in pixels; the text grows with it.
        white: value of a white pixel.
    """
    indices = torch.arange(len(images), device=images.device)
    steps = max(draws // len(pipelines), 1)
    labels = [_label(target, classes) for target in targets] if classes else [""] * len(images)
    rows = [_Row(label, [image], [""]) for label, image in zip(labels, images, strict=True)]
    headers, groups = ["original"], [""]
    for name, pipeline in pipelines.items():
        headers += [f"step {step + 1}" for step in range(steps)]
        groups += [name, *[""] * (steps - 1)]
        for step in range(steps):
            rng = generator(images.device, seed, step)
            batch = slice(0, len(images))
            results, mixed = pipeline(
                images, targets, generator=rng, total=len(images), shard=batch, indices=indices, epoch=step
            )
            for row, result, target in zip(rows, results, mixed, strict=True):
                row.images.append(result)
                row.captions.append("" if targets.is_floating_point() else _caption(target, classes))
    return _grid(rows, title, [groups, headers] if any(groups) else [headers], tile, white)


def reading_crops(pipeline: Pipeline, samples: Samples, order: Tensor, seed: int) -> Augment:
    """Returns the augmentation of the samples `order`, which crops whole image files as training does."""
    reader, others = crop_when_reading(pipeline, samples, seed)
    if reader is None:
        return pipeline

    def augment(inputs: Tensor, targets: Tensor, **position: Unpack[Position]) -> tuple[Tensor, Tensor]:
        updates = torch.full_like(order, int(position["epoch"]))
        crops = reader.fetch(torch.stack([order, updates, position["indices"]], 1))
        return (crops, targets) if others is None else others(crops, targets, **position)

    return augment


def _label(target: Tensor, classes: Sequence[str]) -> str:
    """Returns the name of a class, or the names of the labels of a sample that has several."""
    indices = target.nonzero().flatten().tolist() if target.ndim else [int(target)]
    return ", ".join(classes[index] for index in indices)


def _caption(target: Tensor, classes: Sequence[str]) -> str:
    """Returns the classes of a mixed sample with their weights; empty for other samples."""
    if target.ndim == 0 or float(target.max()) > _MIXED:
        return ""
    shares, indices = target.topk(min(2, len(target)))
    return " + ".join(
        f"{100 * share:.0f} % {classes[index] if classes else index}"
        for share, index in zip(shares.tolist(), indices.tolist(), strict=True)
        if share > 1 - _MIXED
    )


@dataclass(frozen=True)
class _Row:
    label: str
    images: list[Tensor]
    captions: list[str]


def _grid(rows: Sequence[_Row], title: str, headings: Sequence[Sequence[str]], tile: int, white: float) -> "Image":
    """Draws the title, lines of headings of the columns, and the rows with their labels and captions."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(max(tile / 9, 11))
    line = round(1.5 * font.getbbox("Ag")[3])
    labels = [font.getlength(row.label) for row in rows]
    left = _GAP + (round(max(labels)) + 2 * _GAP if max(labels) else 0)
    top = line * (bool(title) + len(headings))
    captions = [caption for row in rows for caption in row.captions]
    cell = max(tile, *(math.ceil(font.getlength(text)) for text in [*headings[-1], *captions])) + _GAP
    height = tile + _GAP + (line if any(any(row.captions) for row in rows) else 0)
    width = max(left + cell * len(headings[-1]), round(font.getlength(title)) + 2 * _GAP if title else 0)
    picture = Image.new("RGB", (width, top + height * len(rows)), "white")
    pen = ImageDraw.Draw(picture)

    def write(text: str, x: int, y: int) -> None:
        pen.text((x, y + line / 6), text, fill="black", font=font)

    write(title, _GAP, 0)
    for number, texts in enumerate(headings, bool(title)):
        for column, text in enumerate(texts):
            write(text, left + column * cell, number * line)
    for y, row in enumerate(rows):
        write(row.label, _GAP, top + y * height + (tile - line) // 2)
        for column, (image, caption) in enumerate(zip(row.images, row.captions, strict=True)):
            picture.paste(tile_of(image * (255 / white), tile), (left + column * cell, top + y * height))
            write(caption, left + column * cell, top + y * height + tile)
    return picture


def tile_of(image: Tensor, tile: int) -> "Image":
    """Returns an image [C, H, W] in 0..255 in RGB, scaled so that its longer side has `tile` pixels."""
    from PIL import Image

    if len(image) not in (1, 3):
        image = image[:1]
    pixels = image.float().round().clamp(0, 255).byte().cpu().permute(1, 2, 0).numpy()
    shown = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    small = max(shown.size) <= tile // 2
    scale = tile / max(shown.size)
    size = (max(1, round(shown.width * scale)), max(1, round(shown.height * scale)))
    return shown.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR)
