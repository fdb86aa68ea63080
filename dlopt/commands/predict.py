"""`dlopt predict`: labels images with a trained model."""

import csv
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.commands.command import on_checkpoint, refuse_folder, writing
from dlopt.errors import DONE, RunError, UserError
from dlopt.files import temporary_sibling
from dlopt.job import complain
from dlopt.ranges import Count, Natural

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.training.restore import Trained

_MAY_CHANGE = ("device", "precision", "threads", "allow_packages")
_USAGE = f"""\
dlopt predict checkpoint=PATH images=FOLDER_OR_FILE [output=predictions.csv] [key=value]

Labels an image, or all images in a folder and the folders below it, with the weights in a checkpoint
(outputs/NAME/DATE/checkpoints/best.pt). The training data are not needed.

  output=FILE       CSV: image, class, probability, and the probability p(CLASS) of every class (predictions.csv)
  max_errors=N      unreadable files that are reported and left out; more of them end the command (10)
  batch_size=N      images at a time (64)

Images are scaled to the size of the training's and cut to the centre.
Keys of the config that may be changed: {", ".join(_MAY_CHANGE)}
"""


@on_checkpoint("predict", _USAGE, _MAY_CHANGE)
def predict(
    path: Path,
    changes: dict[str, Any],
    *,
    images: str,
    output: str = "predictions.csv",
    max_errors: Natural = 10,
    batch_size: Count = 64,
) -> int:
    """Writes the CSV. Raises `UserError` for wrong input, `RunError` when too many files cannot be read."""
    files = _files(images)
    target = refuse_folder(Path(output))

    from dlopt.training.restore import restore

    trained = restore(path, changes)
    if len(trained.sample) != 3 or trained.sample[0] not in (1, 3):
        raise UserError(f"checkpoint={path}: its model takes inputs of shape {list(trained.sample)}, not images")
    if trained.config["norm_statistics"] == "exact":
        complain("norm_statistics=exact: needs the training data; the running statistics are used instead")
    count = 0
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(target) as temporary:
            with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                writer = csv.writer(file)
                writer.writerow(_header(trained))
                for row in _rows(files, trained, batch_size, max_errors):
                    writer.writerow(row)
                    count += 1
            if count == 0:
                raise UserError(f"images={images}: none of the files can be read as an image")
            os.replace(temporary, target)
    skipped = len(files) - count
    print(f"{count} images labelled{f', {skipped} left out' if skipped else ''}: {target}")
    return DONE


def _files(images: str) -> list[str]:
    """The file, or the images in and below the folder, ordered by name."""
    from dlopt.data.images import is_image

    if os.path.isfile(images):
        return [images]
    if not os.path.isdir(images):
        raise UserError(f"images={images}: no such file or folder")

    def fail(error: OSError) -> None:
        raise UserError(f"images={images}: {error.filename}: cannot be read ({error.strerror})")

    found = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(images, onerror=fail, followlinks=True)
        for name in names
        if is_image(Path(name))
    ]
    if not found:
        raise UserError(f"images={images}: there are no images in this folder")
    return sorted(found)


def _header(trained: "Trained") -> list[str]:
    if trained.classes is None:
        count = trained.outputs_count
        return ["image", *(["value"] if count == 1 else [f"value_{i}" for i in range(count)])]
    return ["image", "class", "probability", *(f"p({name})" for name in trained.classes)]


def _rows(files: Sequence[str], trained: "Trained", batch_size: int, max_errors: int) -> Iterator[list[str]]:
    """A row per readable file. The next batch is decoded while the model is at work on one."""
    import torch

    from dlopt.losses import probabilities

    errors = 0
    for paths, images in _decoded(files, trained, batch_size):
        good = []
        for path, image in zip(paths, images, strict=True):
            if isinstance(image, UserError):
                errors += 1
                complain(f"left out: {image}")
                if errors > max_errors:
                    raise RunError(f"more than max_errors={max_errors} files cannot be read; nothing was written")
            else:
                good.append((path, image))
        if good:
            outputs = trained.outputs(torch.stack([image for _, image in good]))
            values = outputs if trained.classes is None else probabilities(outputs, trained.loss)
            for (path, _), row in zip(good, values.tolist(), strict=True):
                yield _row(path, row, trained)


def _decoded(
    files: Sequence[str], trained: "Trained", size: int
) -> Iterator[tuple[Sequence[str], list["Tensor | UserError"]]]:
    from dlopt.data.images import decode

    channels, height, width = trained.sample

    def read(path: str) -> "Tensor | UserError":
        try:
            return decode(path, (height, width), channels)
        except UserError as error:
            return error

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        parts = [files[start : start + size] for start in range(0, len(files), size)]
        ahead = [pool.submit(read, path) for path in parts[0]]
        for number, paths in enumerate(parts, 1):
            running, ahead = ahead, [pool.submit(read, path) for path in (parts[number] if number < len(parts) else ())]
            yield paths, [future.result() for future in running]


def _row(path: str, values: list[float], trained: "Trained") -> list[str]:
    shown = [f"{value:.6g}" for value in values]
    if trained.classes is None:
        return [path, *shown]
    best = max(range(len(values)), key=values.__getitem__)
    return [path, trained.classes[best], shown[best], *shown]
