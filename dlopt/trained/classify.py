"""Classifies image files with a trained model."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dlopt.basics.errors import FileError, RunError, UserError
from dlopt.basics.formats import format_count
from dlopt.data.checks import left_out_note
from dlopt.data.images.decoding import Source, Stored, decode_described
from dlopt.data.images.folder import images_below, reading
from dlopt.machine.threads import usable_cores
from dlopt.trained.predict_output import Column
from dlopt.trained.restore import Trained


def image_files(images: str) -> tuple[list[str], tuple[str, ...]]:
    """Returns the file, or the images in a folder and its subfolders, sorted by path, and a line on other files.

    Raises `UserError`.
    """
    if os.path.isfile(images):
        return [images], ()
    if not os.path.isdir(images):
        raise FileError(f"images={images}: no such file or folder")
    with reading(f"images={images}"):
        paths, others = images_below(images)
    notes = left_out_note(others)
    if not paths:
        raise UserError("; ".join([f"images={images}: this folder contains no images", *notes]))
    return paths, notes


def refuse_other_inputs(trained: Trained, path: Path) -> None:
    """Raises `UserError` if the model of the checkpoint `path` does not classify image files."""
    if len(trained.sample) != 3 or trained.sample[0] not in (1, 3):
        raise UserError(
            f"checkpoint={path}: its model takes inputs of shape {list(trained.sample)}, not images; use file=FILE"
        )
    if trained.task.white != 255:
        raise UserError(
            f"checkpoint={path}: its model takes floating-point images in the units of its data; image files have "
            "values 0..255"
        )
    trained.task.check_predicts("checkpoint", path)


class Classified(NamedTuple):
    """The values that a prediction shows, and the number of the class; -1: none, because an output is NaN.

    `stored`: how the image is stored.
    """

    values: list[float]
    best: int
    stored: Stored


def classify(files: Sequence[Source], trained: Trained, batch_size: int) -> Iterator[tuple[str, Classified | str]]:
    """Yields each path with the probabilities of its classes, or with the error of an unreadable file.

    Images that are not given by a path are called images[NUMBER].

    A model of several labels has the probability of each; a regression has the outputs. Each process classifies its
    shard of a batch; all of them yield all results.
    """
    channels, height, width = trained.sample

    def read(image: tuple[str, Source]) -> tuple[Tensor, Stored] | UserError:
        name, source = image
        try:
            return decode_described(source, name, (height, width), channels)
        except UserError as error:
            return error

    shard = trained.mode.split.evaluation_shard
    named = [(each if isinstance(each, str) else f"images[{number}]", each) for number, each in enumerate(files)]
    batches = [named[start : start + batch_size] for start in range(0, len(named), batch_size)]
    if shard is not None:
        batches = [batch[cast(slice, shard(len(batch)))] for batch in batches]
    with ThreadPoolExecutor(max(1, usable_cores() // trained.mode.ranks.local_processes)) as pool:
        upcoming = pool.map(read, batches[0])
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            images, upcoming = upcoming, pool.map(read, following)  # decodes the next batch while this one is computed
            # Rank 0 writes the results of all ranks, in the order of the files: the ranks hold adjacent slices of a
            # batch.
            yield from trained.mode.ranks.gather(_classify([name for name, _ in batch], list(images), trained))


def changes(images: Counter[Stored], sample: tuple[int, ...]) -> str | None:
    """Describes the conversion of images for a model of samples [C, H, W]; None if there was none."""
    channels, *size = sample
    found = []
    resized = Counter({each: count for each, count in images.items() if [each.height, each.width] != size})
    if resized:
        sizes = sorted({(each.height * each.width, f"{each.height}x{each.width}") for each in resized})
        several = f" .. {sizes[-1][1]}" if len(sizes) > 1 else ""
        is_cropped = any(each.height * size[1] != each.width * size[0] for each in resized)
        crop = " and cropped to the centre" if is_cropped else ""
        scaled = f"from {sizes[0][1]}{several} to {size[0]}x{size[1]} (height x width)"
        found.append(f"{resized.total():,} resized{crop}, {scaled}")
    for text, count in (
        ("from colour to grey", sum(n for each, n in images.items() if channels == 1 and not each.is_grey)),
        ("from grey to colour", sum(n for each, n in images.items() if channels == 3 and each.is_grey)),
        ("transparent, laid on white", sum(n for each, n in images.items() if each.has_alpha)),
        ("from 16 to 8 bits", sum(n for each, n in images.items() if each.has_16_bits)),
    ):
        found += [f"{count:,} {text}"] if count else []
    return f"of {format_count('images', images.total())}: {'; '.join(found)}" if found else None


def _classify(
    paths: Sequence[str], images: Sequence[tuple[Tensor, Stored] | UserError], trained: Trained
) -> list[tuple[str, Classified | str]]:
    readable = [image for image in images if not isinstance(image, UserError)]
    found: Iterator[Classified] = iter(())
    if readable:
        outputs = trained.outputs(torch.stack([pixels for pixels, _ in readable]))
        best = trained.predicted(outputs).tolist() if outputs.ndim == 2 else [-1] * len(outputs)
        found = map(Classified, trained.values(outputs).tolist(), best, [stored for _, stored in readable])
    return [
        (path, str(image) if isinstance(image, UserError) else next(found))
        for path, image in zip(paths, images, strict=True)
    ]


# -- `dlopt predict`


@dataclass
class ImagePredictions:
    """See `Predictions`. `max_errors`: unreadable files that are skipped."""

    trained: Trained
    files: Sequence[str]
    batch_size: int
    max_errors: int
    notes: Sequence[str] = ()
    delimiter: str = ","
    count: int = 0

    @property
    def columns(self) -> Sequence[Column]:
        first, *others = self.trained.task.columns(self.trained.classes)
        is_text = self.trained.classes is not None
        return [Column("image"), Column(first, not is_text), *(Column(title, True) for title in others)]

    def chunks(self, warn: Callable[[str], None], show: Callable[[str], None]) -> Iterator[Sequence[Any]]:
        """Yields the values of the readable files.

        Calls `warn` for others, and raises `RunError` for more of them than `max_errors`. Calls it at the end with what
        was done to the images.
        """
        errors, stored, rows = 0, Counter[Stored](), list[list[str | float]]()
        for number, (path, result) in enumerate(classify(self.files, self.trained, self.batch_size), start=1):
            if isinstance(result, str):
                errors += 1
                warn(f"skipped: {result}")
                if errors > self.max_errors:
                    raise RunError(f"max_errors={self.max_errors}: exceeded by unreadable files; nothing was written")
            else:
                stored[result.stored] += 1
                if any(map(math.isnan, result.values)):
                    warn(f"{path}: the outputs of the model have NaN, which names no class")
                rows.append([path, *self.trained.task.cells(result.values, result.best, self.trained.classes)])
            if number % self.batch_size == 0 or number == len(self.files):
                show(f"{number:,} of {format_count('images', len(self.files))}")
                self.count += len(rows)
                if rows:
                    yield [*map(list, zip(*rows, strict=True))]
                rows.clear()
        if (changed := changes(stored, self.trained.sample)) is not None:
            warn(changed)

    def summary(self) -> str:
        skipped = len(self.files) - self.count
        if not self.count:
            return ""
        return f"{format_count('images', self.count)} classified{f', {skipped} skipped' if skipped else ''}"
