"""`dlopt predict`: labels images with a trained model."""

import csv
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dlopt.config.saved import refuse_others, take_path, typed_values
from dlopt.config.schema import check_arguments
from dlopt.errors import RunError, UserError
from dlopt.job import DONE, complain
from dlopt.ranges import Count, Natural

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.train.restore import Trained

_MAY_CHANGE = ("device", "precision", "threads", "allow_packages")
_USAGE = f"""\
dlopt predict checkpoint=PATH images=FOLDER_OR_FILE [output=predictions.csv] [key=value]

Labels an image, or all images in a folder and the folders below it, with the weights in a checkpoint
(outputs/NAME/DATE/checkpoints/best.pt). The training data are not needed.

  output=FILE       CSV: image, class, probability, and the probability p(CLASS) of every class (predictions.csv)
  max_errors=N      unreadable files that are reported and left out; more of them end the command (10)
  batch_size=N      images at a time (64)

Images are scaled to the size of the training's and cut to the centre.
Keys of the config that may be changed: {", ".join(_MAY_CHANGE)}"""


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The keys of this command alone."""

    images: str
    output: str = "predictions.csv"
    max_errors: Natural = 10
    batch_size: Count = 64


def predict(arguments: list[str]) -> int:
    """Writes the CSV. Raises `UserError` for wrong input, `RunError` when too many files cannot be read."""
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)
        return DONE
    values = typed_values(arguments)
    path = take_path(values, "predict")
    names = ("images", "output", "max_errors", "batch_size")
    own = _Own(**check_arguments("", _Own, {key: values.pop(key) for key in names if key in values}))
    refuse_others(values, _MAY_CHANGE, names)
    files = _files(own.images)
    output = Path(own.output)
    if output.is_dir():
        raise UserError(f"output={own.output}: this is a folder; name a file in it")

    from dlopt.train.restore import restore

    trained = restore(path, values)
    if len(trained.sample) != 3 or trained.sample[0] not in (1, 3):
        raise UserError(f"checkpoint={path}: its model takes inputs of shape {list(trained.sample)}, not images")
    if trained.config["norm_statistics"] == "exact":
        complain("norm_statistics=exact: needs the training data; the running statistics are used instead")
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(_header(trained))
            count = 0
            for row in _rows(files, trained, own):
                writer.writerow(row)
                count += 1
        if count == 0:
            raise UserError(f"images={own.images}: none of the files can be read as an image")
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"output={own.output}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    skipped = len(files) - count
    print(f"{count} images labelled{f', {skipped} left out' if skipped else ''}: {output}")
    return DONE


def _files(images: str) -> list[str]:
    """The file, or the images in and below the folder, ordered by name."""
    from dlopt.data.images import is_image

    if os.path.isfile(images):
        return [images]
    if not os.path.isdir(images):
        raise UserError(f"images={images}: there is no such file or folder")

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


def _rows(files: Sequence[str], trained: "Trained", own: _Own) -> Iterator[list[str]]:
    """A row per readable file. The next batch is decoded while the model is at work on one."""
    import torch

    errors = 0
    for paths, images in _decoded(files, trained, own.batch_size):
        good = []
        for path, image in zip(paths, images, strict=True):
            if isinstance(image, UserError):
                errors += 1
                complain(f"left out: {image}")
                if errors > own.max_errors:
                    raise RunError(f"more than max_errors={own.max_errors} files cannot be read; nothing was written")
            else:
                good.append((path, image))
        if good:
            values = _values(trained.outputs(torch.stack([image for _, image in good])), trained)
            for (path, _), row in zip(good, values, strict=True):
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


def _values(outputs: "Tensor", trained: "Trained") -> list[list[float]]:
    from dlopt.losses import probabilities

    numbers: list[list[float]] = (outputs if trained.classes is None else probabilities(outputs, trained.loss)).tolist()
    return numbers


def _row(path: str, values: list[float], trained: "Trained") -> list[str]:
    shown = [f"{value:.6g}" for value in values]
    if trained.classes is None:
        return [path, *shown]
    best = max(range(len(values)), key=values.__getitem__)
    return [path, trained.classes[best], shown[best], *shown]
