"""`dlopt eval`: tests checkpoints with the configs that they hold."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlopt.commands.command import on_checkpoint, writing
from dlopt.config.compose import resolve_saved
from dlopt.config.saved import with_changes
from dlopt.config.schema import check_arguments, show
from dlopt.errors import DONE, FAILED, RunError, UserError
from dlopt.files import write_atomically
from dlopt.job import complain
from dlopt.plain import without_nan
from dlopt.tracking.layout import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from dlopt.training.evaluate import Average, Report

_MAY_CHANGE = (
    "data", "device", "precision", "threads", "channels_last", "compile", "deterministic", "norm_statistics",
    "allow_packages",
)  # fmt: skip
_USAGE = f"""\
dlopt eval checkpoint=PATH [tta=CHOICE] [key=value]

Tests the weights in a checkpoint (outputs/NAME/DATE/checkpoints/best.pt) with the config that stands in it.
Several, as checkpoint=[PATH,PATH] or checkpoint=RUN/checkpoints/restart-*.pt, are tested as an ensemble: their outputs
are averaged.
Keys that may be changed: {", ".join(f"{key}.*" if key == "data" else key for key in _MAY_CHANGE)}

  tta=none                  the test images as in training's own test
  tta=flip                  and their mirror images
  tta=shift_flip            shifted by tta.shift=1 pixels to two sides, too
  tta=ten_crop              corners, centre, and their mirror images: crops of tta.crop=SIZE (the training's), cut from
                            images whose shorter side is tta.scale=SIZE (as they are, or 8/7 of the crop)
  tta=multi_scale_ten_crop  ten crops at each of tta.scales=[224,256,384,480,640] (for crops of 224; else in proportion)
  average=probabilities     what is averaged over views and checkpoints: probabilities | logits
  output=DIR                where eval.json, confusion.csv and confusion.png go (the checkpoint's run folder)
"""

_SHOWN_CLASSES = 20
_MOST_NUMBERS = 20  # classes up to which each cell of the confusion matrix shows its count
_MOST_NAMES = 60  # classes up to which their names can be read


@dataclass(frozen=True)
class _Member:
    """A tested checkpoint."""

    path: Path
    epoch: int
    classes: tuple[str, ...] | None
    batches: Any  # outputs and targets
    loss: Any
    average: "Average"


@on_checkpoint("eval", _USAGE, _MAY_CHANGE, several=True)
def evaluate(
    paths: list[Path],
    changes: dict[str, Any],
    *,
    tta: Literal["none", "flip", "shift_flip", "ten_crop", "multi_scale_ten_crop"] = "none",
    average: Literal["probabilities", "logits"] | None = None,
    output: str | None = None,
) -> int:
    """Tests the checkpoints once; prints the metrics and writes them with the confusion matrix into the run folder."""
    from dlopt.tracking.console import ConsoleView
    from dlopt.training.checkpoint import load

    views = _views(tta, changes)
    states = [load(path) for path in paths]
    try:
        members, report = _test(paths, states, changes, average, views)
    except RunError as error:
        complain(str(error))
        return FAILED
    first, is_one = members[0], len(paths) == 1
    classes = [] if first.classes is None else _per_class(report, first.classes)
    record = {
        "checkpoint": str(first.path) if is_one else [str(path) for path in paths],
        "epoch": first.epoch if is_one else [member.epoch for member in members],
        "tta": {"name": tta, **({} if views is None else vars(views))},
        "average": None if views is None and is_one else first.average,
        **report.metrics,
        "classes": classes,
    }
    lines = [f"checkpoint: {path}" for path in paths]
    if classes:
        lines.append(_class_line(classes))
    written = _write(output, first.path, record, report, first.classes)
    lines += [f"{what}: {path}" for what, path in written.items()]
    epoch = {"best_epoch": first.epoch} if is_one else {}
    ConsoleView().finish({"status": "tested", **epoch, **report.metrics}, lines)
    return DONE


def _views(tta: str, changes: dict[str, Any]) -> Any:
    """The chosen test-time augmentation, whose keys leave `changes`; None for none."""
    from dlopt.training.tta import CHOICES

    keys = {key: changes.pop(key) for key in list(changes) if key.startswith("tta.")}
    if tta != "none":
        target = CHOICES[tta]
        return target(**check_arguments("tta", target, {key[4:]: value for key, value in keys.items()}))
    for key, value in keys.items():
        raise UserError(f"{key}={show(value)}: tta=none has no such key; choose {', '.join(CHOICES)}")
    return None


def _test(
    paths: Sequence[Path],
    states: Sequence[Mapping[str, Any]],
    changes: Mapping[str, Any],
    typed: "Average | None",
    views: Any,
) -> tuple[list[_Member], "Report"]:
    """Every checkpoint by itself, on batches of the first one's size, and the figures of their mean."""
    from dlopt.config.parsing import parse
    from dlopt.training.build import build_workload
    from dlopt.training.evaluate import check_same_samples, choose_average, combine, predict_test_set, report

    members: list[_Member] = []
    size = {} if len(paths) == 1 else {"data.batch_size": states[0]["config"]["data"]["batch_size"]}
    for path, state in zip(paths, states, strict=True):
        experiment = parse(resolve_saved(with_changes(state["config"], {**size, **changes}, path)))
        workload = build_workload(experiment, state["normalize"])
        workload.module.load_state_dict(state["ema"] or state["model"])
        average = choose_average(typed, workload)
        batches = predict_test_set(workload, views, average)
        epoch = state["progress"]["epoch"]
        members.append(_Member(path, epoch, workload.dataset.classes, batches, workload.loss, average))
        if len({member.average for member in members}) > 1:
            raise UserError(f"checkpoint={path}: trained with another kind of loss than {paths[0]}; use average=logits")
    check_same_samples([vars(member) for member in members])
    classes = members[0].classes
    batches = combine([member.batches for member in members], members[0].average)
    return members, report(batches, members[0].loss, None if classes is None else len(classes))


def _per_class(report: "Report", classes: Sequence[str]) -> list[dict[str, Any]]:
    from dlopt.training.metrics import class_accuracies, f1_scores

    assert report.confusion is not None
    columns = (report.confusion.sum(1), class_accuracies(report.confusion), f1_scores(report.confusion))
    rows = zip(classes, *(column.tolist() for column in columns), strict=True)
    return [
        {"class": name, "samples": samples, "accuracy": without_nan(accuracy), "f1": without_nan(f1)}
        for name, samples, accuracy, f1 in rows
    ]


def _class_line(per_class: Sequence[Mapping[str, Any]]) -> str:
    known = [each for each in per_class if each["accuracy"] is not None]
    title = "accuracy by class"
    if len(per_class) > _SHOWN_CLASSES:
        title, known = "lowest accuracies", sorted(known, key=lambda each: each["accuracy"])[:5]
    return f"{title}: " + ", ".join(f"{each['class']} {percent(each['accuracy'])}" for each in known)


def _write(
    output: str | None, checkpoint: Path, record: dict[str, Any], report: "Report", classes: Sequence[str] | None
) -> dict[str, Path]:
    """Writes into `output`, or into the run folder where the checkpoint is in one; returns what -> path."""
    run = checkpoint.absolute().parent.parent
    if output is None and not (run / "config.yaml").is_file():
        return {}
    folder = run if output is None else Path(output)
    files = {"figures": ("eval.json", (json.dumps(without_nan(record), indent=2) + "\n").encode())}
    if report.confusion is not None and classes is not None:
        picture = io.BytesIO()
        title = f"{percent(report.metrics['test_accuracy'])} of {int(report.confusion.sum())} test samples are right"
        confusion_picture(report.confusion, classes, title).savefig(picture, dpi=150, format="png")
        table = confusion_table(report.confusion, classes)
        files["confusion matrix"] = ("confusion.csv", table.encode("utf-8", "surrogateescape"))
        files["its picture"] = ("confusion.png", picture.getvalue())
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.values():
            write_atomically(folder / name, data)
    return {what: folder / name for what, (name, _) in files.items()}


def confusion_table(confusion: "Tensor", classes: Sequence[str]) -> str:
    """CSV: a row per true class, a column per predicted one, counts in the cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true \\ predicted", *classes])
    for name, row in zip(classes, confusion.tolist(), strict=True):
        writer.writerow([name, *row])
    return text.getvalue()


def confusion_picture(confusion: "Tensor", classes: Sequence[str], title: str) -> "Figure":
    """Rows are true classes, shaded by the share of the row; counts stand in the cells where there is room."""
    from matplotlib.figure import Figure

    count = len(classes)
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).tolist()
    size = min(max(3.2 + 0.42 * count, 5.0), 14.0)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if count <= _MOST_NUMBERS:
        for y, row in enumerate(confusion.tolist()):
            for x, number in enumerate(row):
                colour = "white" if shares[y][x] > 0.5 else "black"
                if number:
                    axes.text(x, y, f"{number}", ha="center", va="center", fontsize=8, color=colour)
    if count <= _MOST_NAMES:
        longest = max(len(name) for name in classes)
        axes.set_xticks(range(count), classes, rotation=90 if longest > 3 else 0, fontsize=8, parse_math=False)
        axes.set_yticks(range(count), classes, fontsize=8, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11)
    return figure
