"""`dlopt eval`: tests checkpoints with the configs that they hold."""

import glob
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlopt.config.compose import resolve_saved
from dlopt.config.saved import refuse_others, take_path, typed_values, with_changes
from dlopt.config.schema import check_arguments, show
from dlopt.errors import RunError, UserError
from dlopt.files import write_atomically
from dlopt.job import DONE, FAILED, complain
from dlopt.tracking.layout import percent

if TYPE_CHECKING:
    from dlopt.train.evaluate import Average, Report

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
  output=DIR                where eval.json, confusion.csv and confusion.png go (the checkpoint's run folder)"""

_SHOWN_CLASSES = 20


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The keys of this command alone."""

    tta: Literal["none", "flip", "shift_flip", "ten_crop", "multi_scale_ten_crop"] = "none"
    average: Literal["probabilities", "logits"] | None = None
    output: str | None = None


@dataclass(frozen=True)
class _Member:
    """A tested checkpoint."""

    path: Path
    epoch: int
    classes: tuple[str, ...] | None
    batches: Any  # outputs and targets
    loss: Any
    average: "Average"


def evaluate(arguments: list[str]) -> int:
    """Tests `checkpoint=...` once; prints the figures and writes them with the confusion matrix into its run folder."""
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)
        return DONE
    from dlopt.tracking.console import ConsoleView
    from dlopt.train.checkpoint import load

    values = typed_values(arguments)
    paths = _paths(values)
    own, choice = _own(values)
    refuse_others(values, _MAY_CHANGE, _Own.__dataclass_fields__)
    states = [load(path) for path in paths]
    try:
        tested = _test(paths, states, values, own, choice)
    except RunError as error:
        complain(str(error))
        return FAILED
    members, report = tested
    first = members[0]
    figures = {
        "checkpoint": str(first.path) if len(paths) == 1 else [str(path) for path in paths],
        "epoch": first.epoch if len(paths) == 1 else [member.epoch for member in members],
        "tta": {"name": own.tta, **({} if choice is None else vars(choice))},
        "average": first.average if choice is not None or len(paths) > 1 else None,
        **report.figures,
    }
    lines = [f"checkpoint: {path}" for path in paths]
    per_class = [] if first.classes is None else _per_class(report, first.classes)
    if per_class:
        lines.append(_class_line(per_class))
    for name, path in _write(own.output, first.path, {**figures, "classes": per_class}, report, first.classes).items():
        lines.append(f"{name}: {path}")
    epoch = {"best_epoch": first.epoch} if len(paths) == 1 else {}
    ConsoleView().finish({"status": "tested", **epoch, **report.figures}, lines)
    return DONE


def _paths(values: dict[str, Any]) -> list[Path]:
    typed = values.get("checkpoint")
    if not isinstance(typed, list):
        path = take_path(values, "eval")
        found = sorted(glob.glob(str(path))) if "*" in path.name and not path.exists() else []
        return [Path(each) for each in found] or [path]
    del values["checkpoint"]
    if not typed or not all(isinstance(each, str) and each for each in typed):
        raise UserError(f"checkpoint={show(typed)}: a list of paths is needed: checkpoint=[a/best.pt,b/best.pt]")
    return [Path(each) for each in typed]


def _own(values: dict[str, Any]) -> tuple[_Own, Any]:
    """This command's keys, which leave `values`, and the chosen views."""
    from dlopt.train.tta import CHOICES

    mine: dict[str, Any] = {key: values.pop(key) for key in ("tta", "average", "output") if key in values}
    own = _Own(**check_arguments("", _Own, mine))
    keys = {key: values.pop(key) for key in list(values) if key.startswith("tta.")}
    if own.tta == "none":
        for key, value in keys.items():
            raise UserError(f"{key}={show(value)}: tta=none has no such key; choose {', '.join(CHOICES)}")
        return own, None
    target = CHOICES[own.tta]
    return own, target(**check_arguments("tta", target, {key[4:]: value for key, value in keys.items()}))


def _test(
    paths: Sequence[Path], states: Sequence[Mapping[str, Any]], overrides: Mapping[str, Any], own: _Own, choice: Any
) -> tuple[list[_Member], "Report"]:
    """Every checkpoint by itself, on batches of the first one's size, and the figures of their mean."""
    from dlopt.config.parsing import parse
    from dlopt.train.build import set_up
    from dlopt.train.evaluate import check_same_samples, choose_average, combine, outputs_on_test_set, report

    members: list[_Member] = []
    size = {} if len(paths) == 1 else {"data.batch_size": states[0]["config"]["data"]["batch_size"]}
    for path, state in zip(paths, states, strict=True):
        experiment = parse(resolve_saved(with_changes(state["config"], {**size, **overrides}, path)))
        setup = set_up(experiment, state["normalize"])
        setup.module.load_state_dict(state["ema"] or state["model"])
        average = choose_average(own.average, setup)
        batches = outputs_on_test_set(setup, choice, average)
        epoch = state["progress"]["epoch"]
        members.append(_Member(path, epoch, setup.dataset.classes, batches, setup.loss, average))
        if len({member.average for member in members}) > 1:
            raise UserError(f"checkpoint={path}: trained with another kind of loss than {paths[0]}; use average=logits")
    check_same_samples([vars(member) for member in members])
    classes = members[0].classes
    batches = combine([member.batches for member in members], members[0].average)
    return members, report(batches, members[0].loss, None if classes is None else len(classes))


def _per_class(report: "Report", classes: Sequence[str]) -> list[dict[str, Any]]:
    from dlopt.train.metrics import class_accuracies, f1_scores

    assert report.confusion is not None
    columns = (report.confusion.sum(1), class_accuracies(report.confusion), f1_scores(report.confusion))
    rows = zip(classes, *(column.tolist() for column in columns), strict=True)
    return [
        {"class": name, "samples": samples, "accuracy": _finite(accuracy), "f1": _finite(f1)}
        for name, samples, accuracy, f1 in rows
    ]


def _class_line(per_class: Sequence[Mapping[str, Any]]) -> str:
    known = [each for each in per_class if each["accuracy"] is not None]
    if len(per_class) <= _SHOWN_CLASSES:
        return "accuracy by class: " + ", ".join(f"{each['class']} {percent(each['accuracy'])}" for each in known)
    worst = sorted(known, key=lambda each: each["accuracy"])[:5]
    return "lowest accuracies: " + ", ".join(f"{each['class']} {percent(each['accuracy'])}" for each in worst)


def _write(
    output: str | None, checkpoint: Path, figures: dict[str, Any], report: "Report", classes: Sequence[str] | None
) -> dict[str, Path]:
    """Writes into `output`, or into the run folder where the checkpoint stands in one; returns what -> path."""
    from dlopt.commands.confusion import confusion_picture, confusion_table

    run = checkpoint.absolute().parent.parent
    if output is None and not (run / "config.yaml").is_file():
        return {}
    folder = run if output is None else Path(output)
    figures = {key: _finite(value) for key, value in figures.items()}
    files = {"figures": ("eval.json", (json.dumps(figures, indent=2) + "\n").encode())}
    if report.confusion is not None and classes is not None:
        picture = io.BytesIO()
        title = f"{percent(report.figures['test_accuracy'])} of {int(report.confusion.sum())} test samples are right"
        confusion_picture(report.confusion, classes, title).savefig(picture, dpi=150, format="png")
        table = confusion_table(report.confusion, classes)
        files["confusion matrix"] = ("confusion.csv", table.encode("utf-8", "surrogateescape"))
        files["its picture"] = ("confusion.png", picture.getvalue())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.values():
            write_atomically(folder / name, data)
    except OSError as error:
        raise UserError(f"output={folder}: the figures cannot be written there: {error.strerror}") from None
    return {what: folder / name for what, (name, _) in files.items()}


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
