"""`dlopt predict`: classifies images with a trained model."""

import csv
import os
from pathlib import Path
from typing import Annotated, Any

from dlopt.basics.errors import DONE, UserError
from dlopt.basics.files import temporary_sibling
from dlopt.basics.formats import format_count
from dlopt.basics.interruption import print_message
from dlopt.basics.ranges import Count, Natural
from dlopt.commands.shared.command_line import on_checkpoint, refuse_folder, writing
from dlopt.commands.shared.processes import join_processes, over_processes, take_process_keys
from dlopt.config.reads import INFERENCE

_READS = (*INFERENCE, "allow_packages", "parallel")
USAGE = """\
Classify images with a checkpoint

Usage: dlopt predict RUN images=FOLDER [key=value]    # RUN: a run, a checkpoint, or a sweep

Examples:
  dlopt predict outputs/train/DATE images=photos
  dlopt predict checkpoint=outputs/train/DATE/checkpoints/last.pt images=photos

Resizes the images to the size of the training images and takes the centre crop. Does not need the training data.
With several labels per image, the CSV file has the columns image, labels (a;b) and p(LABEL) for each label.

  {_predict}
  parallel.processes=N :: divides the images over N processes; also under torchrun and srun

Uses the config saved in the checkpoint. Keys that can be overridden:
    {_READS}
"""


def predict(arguments: list[str]) -> int:
    """Runs `dlopt predict` with the given arguments; returns the exit code. Raises `UserError`."""
    return over_processes("predict", _predict, arguments)


@on_checkpoint("predict", _READS)
def _predict(
    path: Path,
    changes: dict[str, Any],
    *,
    images: Annotated[str, "PATH: an image, or a folder of images (recursively, without hidden files and folders)"],
    output: Annotated[
        str,
        "FILE: CSV: image, class, probability, and p(CLASS) for each class",
    ] = "predictions.csv",
    max_errors: Annotated[Natural, "N: maximum number of unreadable files to skip with a warning"] = 10,
    batch_size: Annotated[Count, "N: batch size over all processes"] = 64,
) -> int:
    """Writes the CSV file. Raises `UserError` for wrong input, `RunError` if too many files are unreadable."""
    from dlopt.trained.classify import header, image_files, refuse_other_inputs, rows
    from dlopt.trained.restore import restore

    files, notes = image_files(images)
    target = refuse_folder(Path(output))

    keys = take_process_keys(changes, "predict")
    trained = restore(path, changes, lambda device: join_processes(device, keys))
    refuse_other_inputs(trained, path)
    if trained.warning is not None and trained.mode.ranks.is_main:
        print_message(trained.warning)
    if not trained.mode.ranks.is_main:
        for _ in rows(files, trained, batch_size, max_errors, lambda _: None):  # takes part in gathering each batch
            pass
        return DONE
    for note in notes:
        print_message(note)
    count = 0
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(target) as temporary:
            with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                writer = csv.writer(file)
                writer.writerow(header(trained))
                for row in rows(files, trained, batch_size, max_errors, print_message):
                    writer.writerow(row)  # not redacted: paths and classes are data
                    count += 1
            if count == 0:
                raise UserError(f"images={images}: none of the files is a readable image")
            os.replace(temporary, target)
    skipped = len(files) - count
    print(f"{format_count('images', count)} classified{f', {skipped} skipped' if skipped else ''}: {target}")
    return DONE
