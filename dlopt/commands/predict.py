"""`dlopt predict`: predictions of a trained model for images, the rows of a table, or a text."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dlopt.basics.errors import DONE, FileError, UserError
from dlopt.basics.files import temporary_sibling
from dlopt.basics.formats import format_value
from dlopt.basics.interruption import print_note
from dlopt.basics.ranges import Count, Natural
from dlopt.basics.status_line import status_line
from dlopt.commands.shared.command_line import load_torch, on_checkpoint, refuse_folder, writing
from dlopt.commands.shared.document import show_result
from dlopt.commands.shared.processes import join_processes, over_processes, take_process_keys
from dlopt.config.reads import INFERENCE
from dlopt.trained.decision import FILE, decision_of

if TYPE_CHECKING:
    from dlopt.trained.predict_output import Predictions
    from dlopt.trained.restore import Trained

_READS = (*INFERENCE, "allow_packages", "parallel")
_SUFFIXES = (".csv", ".txt", "", ".parquet")
USAGE = """\
Predict images, the rows of a table, or a text with a checkpoint

Usage: dlopt predict RUN images=FOLDER [key=value]    # RUN: a run, a checkpoint, or a sweep
       dlopt predict RUN file=FILE [key=value]

Examples:
  dlopt predict outputs/train/DATE images=photos
  dlopt predict outputs/train/DATE file=new_patients.csv
  dlopt predict outputs/train/DATE file=new_patients.parquet probabilities=all
  dlopt predict outputs/train/DATE file=new_patients.csv columns=[id]
  dlopt predict outputs/train/DATE file=notes.txt per=line
  dlopt predict checkpoint=outputs/train/DATE/checkpoints/last.pt images=photos

Does not need the training data. Shows progress in a terminal.

Images are resized to the size of the training images, and the centre is cropped. The columns are image, class,
probability and p(CLASS) for each class; with several labels per image: image, labels (a;b) and p(LABEL) for each label.

A table (CSV or Parquet) gets all its rows and columns back, in order, then prediction and probability. The model finds
its features by name; the label may be missing. The prediction of a regression is in the unit of the label.

A class is that of decision.json beside the checkpoint, if there is one (`dlopt eval threshold=RULE`), or else the most
probable one.

A text gets its mean loss in nats, as `dlopt eval` computes it, in bits per byte, and as perplexity of tokens. With
per=document, a Parquet file also gets its columns back; with per=line and per=window, its texts are one text.

  {_predict}
  parallel.processes=N :: divides the work over N processes; also under torchrun and srun

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
    images: Annotated[
        str | None,
        "PATH: an image, or a folder of images (recursively, without hidden files and folders)",
        "required without file",
    ] = None,
    file: Annotated[
        str | None,
        "FILE: a table (CSV or Parquet); for a language model a text, a Parquet file of texts, or a file of tokens",
    ] = None,
    output: Annotated[
        str | None,
        "FILE: CSV, or Parquet if it ends in .parquet (default: predictions.csv, or .parquet for a file in Parquet)",
    ] = None,
    probabilities: Annotated[
        Literal["predicted", "all"] | None,
        "NAME: of a table: predicted: of the predicted class; all: also p(CLASS) for each class (default: predicted)",
        "needs file",
    ] = None,
    columns: Annotated[
        list[str | int] | None,
        "LIST: of a table: its columns to keep in the output, in this order: [id], or [] for none (default: all)",
        "needs file",
    ] = None,
    per: Annotated[
        Literal["line", "document", "window"] | None,
        "NAME: of a text: what a row is: line, document (texts with a zero byte between them, or rows of a Parquet "
        "file), or window of the training's length (default: line; document in Parquet; window of tokens)",
        "needs file",
    ] = None,
    max_errors: Annotated[
        Natural | None, "N: maximum number of unreadable images to skip with a warning (default: 10)", "needs images"
    ] = None,
    batch_size: Annotated[
        Count | None,
        "N: batch size over all processes (default: 64; less for texts with a large vocabulary)",
    ] = None,
) -> int:
    """Writes the predictions. Raises `UserError` for wrong input, `RunError` if too many files are unreadable."""
    from dlopt.trained.predict_output import is_table_of_parquet, writer

    if images is not None and not os.path.exists(images):
        raise FileError(f"images={images}: no such file or folder")
    target = _target(output, file, is_table=file is not None and is_table_of_parquet(file))
    decision = decision_of(path)
    load_torch()
    from dlopt.trained.classify import image_files
    from dlopt.trained.restore import restore

    found = None if images is None else image_files(images)
    keys = take_process_keys(changes, "predict")
    trained = restore(path, changes, lambda device: join_processes(device, keys), decision)
    if file is not None and Path(file).is_file():
        trained.mode.ranks.refuse_other_file("file", file)
    if found is not None:
        listed = f"{len(found[0])} images of {sum(map(os.path.getsize, found[0])):,} bytes"
        trained.mode.ranks.refuse_difference(f"images={images}", listed)
    given = {"max_errors": max_errors, "probabilities": probabilities, "columns": columns, "per": per}
    given["batch_size"] = batch_size
    predictions = _predictions(trained, path, found, file, given)
    if not trained.mode.ranks.is_main:
        for _ in predictions.chunks(lambda _: None, lambda _: None):  # takes part in gathering each batch
            pass
        return DONE
    decided = None if decision is None else f"decided by {FILE}: {decision.text}"
    for note in filter(None, (trained.warning, decided, *predictions.notes)):
        print_note(note)
    with writing(target), status_line() as show:

        def warn(message: str) -> None:
            show("")
            print_note(message)

        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(target) as temporary:
            with writer(temporary, target.suffix, predictions.columns, predictions.delimiter) as write:
                for values in predictions.chunks(warn, show):
                    write(values)
            if not predictions.summary():
                what = "has no rows" if images is None else "none of the files is a readable image"
                raise UserError(f"{'file' if images is None else 'images'}={images or file}: {what}")
            os.replace(temporary, target)
    print(f"{predictions.summary()}: {target}")
    names = [each.name for each in predictions.columns]
    show_result({"file": os.path.abspath(target), "columns": names, "summary": predictions.summary()})
    return DONE


def _target(output: str | None, file: str | None, *, is_table: bool) -> Path:
    """Returns the file to write. Raises `UserError`; `is_table`: the input is a Parquet file."""
    if output is None:
        output = "predictions.parquet" if is_table else "predictions.csv"
    target = refuse_folder(Path(output))
    if target.suffix not in _SUFFIXES:
        raise UserError(f"output={output}: must end in .csv or .parquet")
    if file is not None and target.exists() and target.samefile(file):
        raise UserError(f"output={output}: is the input; write to another file")
    if target.suffix == ".parquet":
        from dlopt.data.tables.parquet import library

        library(f"output={output}")
    return target


def _predictions(
    trained: "Trained",
    path: Path,
    images: tuple[list[str], tuple[str, ...]] | None,
    file: str | None,
    given: dict[str, Any],
) -> "Predictions":
    """Returns the predictions of images, a table or a text. Raises `UserError` for a key of the other kind of file."""
    from dlopt.tasks.text import NextToken
    from dlopt.trained.classify import ImagePredictions, refuse_other_inputs
    from dlopt.trained.predict_tables import predict_table
    from dlopt.trained.predict_texts import predict_text

    batch_size, max_errors = given["batch_size"], given["max_errors"]
    if images is not None:
        refuse_other_inputs(trained, path)
        files, notes = images
        return ImagePredictions(trained, files, batch_size or 64, 10 if max_errors is None else max_errors, notes)
    assert file is not None
    is_text = isinstance(trained.task, NextToken)
    what, others = ("a text", ("probabilities", "columns")) if is_text else ("a table", ("per",))
    for other in others:
        if given[other] is not None:
            typed = format_value(given[other])
            raise UserError(f"{other}={typed}: predictions of {what} do not have this key; leave it out")
    if is_text:
        return predict_text(trained, path, file, batch_size, given["per"])
    names = None if given["columns"] is None else [*map(str, given["columns"])]
    return predict_table(trained, path, file, batch_size or 64, given["probabilities"], names)
