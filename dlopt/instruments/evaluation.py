"""The results of a test: eval.json, and tables and pictures of classes, values and the most wrong samples."""

import json
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dlopt.augment.show import tile_of
from dlopt.basics.files import write_atomically
from dlopt.basics.folders import short_path
from dlopt.basics.plain_values import without_nan
from dlopt.basics.secrets import redacted
from dlopt.data.samples import Dataset
from dlopt.data.tables.columns import FeatureColumns
from dlopt.instruments import reconstructions
from dlopt.metrics.declaration import Evaluated
from dlopt.metrics.names import SPLITS, set_of, without_set
from dlopt.metrics.shown import format_metric, live_name
from dlopt.parallel.mode import Mode
from dlopt.results import drawing, most_wrong, tested_curves
from dlopt.results.confusion import confusion_table, plot_confusion
from dlopt.results.tested_curves import Curves
from dlopt.results.tested_plots import plot_curves, plot_values
from dlopt.tasks.report import TestReport
from dlopt.tracking.metrics import read_summary
from dlopt.trained.ensemble import Tested
from dlopt.training.builders.workload import Workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _NO_BREAK = 80, "\xa0"  # characters of a line
_FILES = {  # by name; of those with the same description the last one is listed
    "eval.json": "metrics", "confusion.csv": "confusion matrix", "most_wrong.csv": "most wrong samples",
    "confusion.png": "confusion matrix", "evaluation.png": "ROC, precision-recall and calibration",
    "predicted.png": "predictions and errors", "most_wrong.png": "most wrong samples",
}  # fmt: skip
_MAX_STORED_CLASSES = 50  # of the confusion matrix in eval.json, which a page shows
_FEW = 1_000_000  # outputs, whose curves take 100 ms
_MAX_FEATURES = 200
_DRAWING, _OF_OUTPUT = 2.0, 8e-7  # seconds of one core, also for the curves of each output of a test


def set_lines(tested: Tested) -> list[str]:
    """Returns a line with the metrics of each named validation set."""
    lines = []
    for name in tested.sets:
        shown = []
        for column, value in tested.report.metrics.items():
            if set_of(column, [name]):
                metric = without_set(column, [name])
                shown.append(f"{live_name(metric)} {format_metric(metric, value)}")
        # A line is not wrapped within a metric.
        text = f"validation set {name}: {', '.join(each.replace(' ', _NO_BREAK) for each in shown)}"
        lines += [line.replace(_NO_BREAK, " ") for line in textwrap.wrap(text, _WIDTH, subsequent_indent="  ")]
    return lines


def write_of_run(folder: Path, workload: Workload, report: TestReport) -> dict[str, Path | str]:
    """Writes at the end of a run what `dlopt eval` writes of its best model. Returns description -> picture.

    Draws if that takes at most a tenth of the time of the training, else returns the command that draws.
    """
    if report.part is None:
        return {}
    settings, summary = workload.run_config.settings.evaluate, read_summary(folder) or {}
    epoch, is_test = summary.get("best_epoch"), report.split == "test"
    count, views = len(report.part.targets), settings.tta if is_test else "none"
    record = {
        "checkpoint": str(folder / "checkpoints" / ("last.pt" if epoch is None else "best.pt")),
        "epoch": epoch,
        "tta": {"name": views},
        "average": None if views == "none" else settings.average,
        "samples": count,
        "split": SPLITS[report.split],
    }
    dataset = workload.dataset if is_test else replace(workload.dataset, test=workload.dataset.val)
    tested = Tested(report, settings.average, dataset.classes, (), count, split=report.split, dataset=dataset)
    seconds = _DRAWING + _OF_OUTPUT * report.part.outputs.numel()
    draws = 10 * seconds <= (summary.get("seconds") or 0.0)
    written = write(folder, record, tested, draws=draws)
    if not draws:
        return {"pictures of the test": f"`dlopt eval {shlex.quote(short_path(folder))}` draws them"}
    return {text: path for text, path in written.items() if path.suffix == ".png"}


def write(folder: Path, record: Mapping[str, Any], tested: Tested, *, draws: bool = True) -> dict[str, Path]:
    """Writes the metrics of a test, with `record`, its tables and pictures. Returns description -> path.

    `draws`: draw the pictures, and compute the curves of many samples. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, names, part = tested.report, tested.classes or (), tested.report.part
    shown: dict[str, Any] = {}
    files: dict[str, bytes | str] = {}
    if report.confusion is not None and names:
        files["confusion.csv"] = confusion_table(report.confusion, names)
        shown["confusion"] = report.confusion.tolist() if len(names) <= _MAX_STORED_CLASSES else []
    if part is not None and tested.dataset is not None and len(part.targets):
        of_samples, more = _of_samples(tested, part, tested.dataset, draws=draws)
        shown, files = shown | of_samples, files | more
    record = without_nan({**record, **report.metrics, "classes": tested.per_class, **shown})
    if (folder / "eval.json").is_file():  # of an earlier test
        for name in _FILES.keys() - files.keys():
            (folder / name).unlink(missing_ok=True)
    files["eval.json"] = json.dumps(redacted(record), indent=2) + "\n"
    for name, data in files.items():
        write_atomically(folder / name, data)
    written = {text: folder / name for name, text in _FILES.items() if name in files}
    if tested.workload is not None:
        # All processes hold the whole model: one of them draws.
        alone = replace(tested.workload, parallel=Mode(tested.workload.device))
        if (picture := reconstructions.write(alone, folder)) is not None:
            written["reconstructions"] = picture
    return written


def _of_samples(
    tested: Tested, part: Evaluated, data: Dataset, *, draws: bool
) -> tuple[dict[str, Any], dict[str, bytes | str]]:
    """Returns what eval.json has of the samples, and the content of tables and pictures by file name."""
    report, names, test = tested.report, tested.classes, data.test
    assert test is not None
    title = title_of(tested, part)
    figures: dict[str, Figure] = {}

    # 1. The curves of classes or labels, or predictions and targets in the unit of the target.
    if names is not None:
        is_single = report.confusion is not None
        curves = tested_curves.of_classes(part, names) if draws or part.outputs.numel() <= _FEW else Curves()
        samples, wrong = (most_wrong.of_classes if is_single else most_wrong.of_labels)(part, names)
        if draws and report.confusion is not None:
            figures["confusion.png"] = plot_confusion(report.confusion, names, title)
        if draws and curves.calibration:
            figures["evaluation.png"] = plot_curves(curves, title, are_labels=not is_single)
    else:
        columns = data.columns or FeatureColumns((), "target")
        rows = (each.reshape(len(each), -1).double() for each in (part.targets, part.outputs))
        targets, predictions = (each * columns.scale + columns.mean for each in rows)
        known = ~predictions.isnan()
        pairs = targets[known].numpy(), predictions[known].numpy()
        curves, samples = tested_curves.of_values(*pairs), most_wrong.of_values(targets, predictions)
        wrong = len(samples)
        if draws and len(pairs[0]):
            figures["predicted.png"] = plot_values(*pairs, columns.target, title)

    # 2. The most wrong samples.
    samples = [replace(each, source=test.place(each.position)) for each in samples]
    positions = torch.tensor([each.position for each in samples], dtype=torch.int64)
    if draws and samples and len(test.shape) == 3:
        tiles = [tile_of(image * (255 / test.white()), most_wrong.TILE) for image in test.fetch(positions)]
        which = f"the {len(samples)} most wrong of {wrong:,} wrong images" if names else "the largest errors"
        below = "labels, and the one that is most wrong" if samples[0].label else "truth, and the prediction"
        heading = f"{title}\n{which}: the {below}"
        figures["most_wrong.png"], samples = most_wrong.draw(samples, tiles, heading)
    files: dict[str, bytes | str] = {}
    if samples:
        features: dict[str, list[str]] = {}
        if data.columns is not None and len(test.shape) == 1 and test.shape[0] <= _MAX_FEATURES:
            of_features = test.fetch(positions).T.tolist()
            titles = [*data.columns.inputs]
            if len(titles) != len(of_features):  # not known, or of lists of numbers
                titles = [f"x{number}" for number in range(1, len(of_features) + 1)]
            shown = ([f"{value:.7g}" for value in each] for each in of_features)
            features = dict(zip(titles, shown, strict=True))
        files["most_wrong.csv"] = most_wrong.table(samples, features)
    files |= {name: drawing.encoded(figure, "png", dpi=most_wrong.DPI) for name, figure in figures.items()}
    return {"curves": curves.saved, "wrong": wrong, "most_wrong": [*map(asdict, samples)]}, files


def title_of(tested: Tested, part: Evaluated) -> str:
    """Returns "test set: 359 samples, accuracy 98.33 %"."""
    missing = int(part.outputs.reshape(len(part.outputs), -1).isnan().any(1).sum())
    parts = [f"{SPLITS[tested.split].partition(',')[0]} set: {tested.samples:,} samples"]
    parts += [f"{missing:,} with NaN outputs left out"] if missing else []
    for name in ("accuracy", "mean_average_precision", "r2"):
        if (value := tested.report.metrics.get(f"{tested.split}_{name}")) is not None:
            parts.append(f"{name.replace('_', ' ')} {format_metric(name, value)}")
    return ", ".join(parts)
