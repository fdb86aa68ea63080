"""`dlopt eval`: evaluates checkpoints, or weights of other tools, on the test set."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dlopt.basics.errors import DONE, UserError
from dlopt.basics.files import write_json
from dlopt.basics.folders import short_path
from dlopt.basics.interruption import print_note
from dlopt.basics.status_line import status_line
from dlopt.commands.shared.command_line import Line, load_torch, on_checkpoint, on_config, saved_run_config, writing
from dlopt.commands.shared.document import show_result
from dlopt.commands.shared.processes import join_processes, over_processes, take_process_keys
from dlopt.config.overrides import key_of
from dlopt.config.parameters import show
from dlopt.config.reads import INFERENCE
from dlopt.config.settings import Tta
from dlopt.trained.decision import FILE, Rule, digest

if TYPE_CHECKING:
    from dlopt.trained.ensemble import Tested
    from dlopt.training.builders.workload import Workload

_READS = (
    "data", "validation", *INFERENCE, "channels_last", "compile", "deterministic", "norm_statistics", "allow_packages",
    "parallel",
)  # fmt: skip
# Keys that a test of weights depends on; they are composed and checked as in `dlopt train`.
_READS_OF_WEIGHTS = (*_READS, "model", "normalize", "augmentation", "loss", "experiment", "seed", "init_from")
USAGE = """\
Evaluate a checkpoint, an ensemble or the weights of another tool on a split of the data and named validation sets

Usage: dlopt eval RUN [tta=CHOICE] [key=value]                    # RUN: a run, a checkpoint, or a sweep
       dlopt eval init_from=FILE model=CHOICE data=CHOICE [tta=CHOICE] [key=value]

Examples:
  dlopt eval outputs/train/DATE                                            # its best.pt, or else last.pt
  dlopt eval checkpoint=outputs/train/DATE/checkpoints/last.pt tta=flip
  dlopt eval checkpoint=[outputs/a,outputs/b]                              # ensemble: averages the outputs
  dlopt eval checkpoint=outputs/train/DATE/checkpoints/restart-*.pt        # ensemble
  dlopt eval outputs/train/DATE threshold=recall:0.9                       # choose a threshold
  dlopt eval init_from=resnet18.pth model=resnet18 model.stem=imagenet data=imagenet data.root=DIR normalize=fixed

  {_evaluate_checkpoints}
  parallel.processes=N :: divides the test set over N processes; also under torchrun and srun

  threshold=f1 :: two classes: predict the second (positive) one from the probability that maximizes its F1
  threshold=recall:R :: two classes: from the largest probability that finds at least a fraction R of the positives
  threshold=most_probable :: any number of classes: keep the most probable class, fit only the temperature

  tta=none :: test-time augmentation: none
  tta=flip :: original and horizontally flipped images
  tta=shift_flip :: also shifts by tta.shift=1 pixels in two directions
  tta=ten_crop :: four corners and centre, with flips; crop size tta.crop=SIZE (default: that of the training) from \
images with a shorter side of tta.scale=SIZE (default: unscaled, or 8/7 of the crop)
  tta=multi_scale_ten_crop :: ten crops at each of tta.scales=[224,256,384,480,640] (for crops of \
224, else in proportion)

The threshold and the temperature are chosen on the validation set, reported on the test set, and kept in decision.json
beside the checkpoint, where `predict`, `export` and `dlopt.load` find them.

Uses the config saved in the checkpoint. Keys that can be overridden:
    {_READS}
With init_from, the keys of `dlopt train` that matter for a test:
    {_READS_OF_WEIGHTS}
"""

_TtaKey = Annotated[Tta, "NAME: test-time augmentation, see below"]
_AverageKey = Annotated[
    Literal["probabilities", "logits"] | None,
    "NAME: what to average over crops and checkpoints: probabilities or logits (default: probabilities)",
]
_SplitKey = Annotated[
    Literal["test", "val", "train"] | None,
    "test|val|train: split of the data (default: test, or val without a test set)",
]
_ThresholdKey = Annotated[
    Rule | None,
    "RULE: choose a decision threshold and a temperature (calibration), see below",
    "not with split or tta or average",
]
_OutputKey = Annotated[
    str | None,
    "DIR: folder of eval.json, and of tables and pictures: confusion, evaluation, predicted, most_wrong, "
    "reconstructions (default: the run folder)",
]


def evaluate(arguments: list[str]) -> int:
    """Runs `dlopt eval` with the given arguments; returns the exit code. Raises `UserError`."""
    keys = set(map(key_of, arguments))
    if keys >= {"init_from", "checkpoint"}:
        raise UserError("init_from and checkpoint: set one of them; a checkpoint contains its config and its weights")
    if keys >= {"init_from", "threshold"}:
        raise UserError("init_from and threshold: a decision is kept beside a checkpoint, which weights do not have")
    command = _evaluate_weights if "init_from" in keys else _evaluate_checkpoints
    return over_processes("eval", command, arguments)


@on_checkpoint("eval", _READS, several=True)
def _evaluate_checkpoints(
    paths: list[Path],
    changes: dict[str, Any],
    *,
    tta: _TtaKey = "none",
    average: _AverageKey = None,
    split: _SplitKey = None,
    threshold: _ThresholdKey = None,
    output: _OutputKey = None,
) -> int:
    """Evaluates the checkpoints, prints the metrics, and saves them with the confusion matrix."""
    if threshold is not None and len(paths) > 1:
        raise UserError(f"threshold={threshold}: a decision belongs to one checkpoint; name one")
    load_torch()
    from dlopt.machine.device import choose_device
    from dlopt.trained import deciding
    from dlopt.trained.ensemble import restored, test
    from dlopt.training.checkpoint.checkpoints import load

    views, processes = _views(tta, changes), take_process_keys(changes, "eval")
    sha256 = digest(paths[0])
    checkpoints = [load(path) for path in paths]
    size = {} if len(paths) == 1 else {"data.batch_size": checkpoints[0].config["data"]["batch_size"]}
    run_configs = [
        saved_run_config(checkpoint.config, {**size, **changes}, path)
        for path, checkpoint in zip(paths, checkpoints, strict=True)
    ]
    mode = join_processes(choose_device(run_configs[0].settings.device), processes)
    models: Iterable[Workload] = restored(paths, checkpoints, run_configs, mode, print_note)
    validated = None
    with _counted(mode.ranks.is_main) as on_batch:
        if threshold is not None:
            models = [*models]
            deciding.refuse(threshold, models[0])
            validated = test(paths, [replace(models[0], validation_sets={})], None, None, tta, on_batch, "val")
        tested = test(paths, models, average, views, tta, on_batch, split)
    if not mode.ranks.is_main:
        return DONE
    names = [str(path) for path in paths]
    # A fraction, if the best model is one of an evaluation within an epoch.
    epochs = [max(checkpoint.epoch, checkpoint.evaluated_epoch) for checkpoint in checkpoints]
    is_one = len(paths) == 1
    source: dict[str, Any] = (
        {"checkpoint": names[0], "epoch": epochs[0]} if is_one else {"checkpoint": names, "epoch": epochs}
    )
    run = paths[0].absolute().parent.parent
    folder = run if output is None and (run / "config.yaml").is_file() else output
    lines, file = [f"checkpoint: {path}" for path in paths], paths[0].with_name(FILE)
    if threshold is not None:
        assert validated is not None and validated.report.part and tested.report.part and tested.classes
        parts = validated.report.part, tested.report.part
        decision = deciding.choose(threshold, paths[0], sha256, *parts, tested.classes)
        with writing(file):
            write_json(file, vars(decision))
        source["decision"] = vars(decision)
        lines += [*deciding.lines(decision), f"kept in: {short_path(file)}"]
    elif is_one and file.exists():
        lines.append(f"{short_path(file)}: is for `predict` and `export`; this test does not apply it")
    return _finish(source, tta, views, tested, folder, lines)


@on_config("eval", _READS_OF_WEIGHTS, several="one value is needed: a test has one model", one=True)
def _evaluate_weights(
    line: Line,
    *,
    tta: _TtaKey = "none",
    average: _AverageKey = None,
    split: _SplitKey = None,
    output: _OutputKey = None,
) -> int:
    """Evaluates the weights `init_from` in the model of the command line, without a checkpoint."""
    from dlopt.machine.device import choose_device
    from dlopt.models.foreign import advice
    from dlopt.trained.ensemble import test
    from dlopt.training.builders.workload import build_workload, load_weights, with_validation_sets

    command_overrides = [each for each in line.overrides if key_of(each).startswith(("tta.", "parallel"))]
    values = {key_of(override): override.value() for override in line.composer.parse(command_overrides)}
    processes = take_process_keys(values, "eval")
    views = _views(tta, values)
    run_config, _ = line.run_config([each for each in line.overrides if each not in command_overrides])
    path = Path(run_config.settings.init_from or "")
    mode = join_processes(choose_device(run_config.settings.device), processes)
    workload = build_workload(run_config, parallel=mode)
    if run_config.validation:
        workload = with_validation_sets(workload)
    lines = load_weights(workload.module, path, mode, complete=True, classes=workload.class_names)
    with _counted(mode.ranks.is_main) as on_batch:
        tested = test([path], [workload], average, views, tta, on_batch, split)
    if tested.report.confusion is not None:
        accuracy = tested.report.metrics[f"{tested.split}_accuracy"]
        lines += advice(workload.module, accuracy, len(tested.report.confusion))
    return _finish({"init_from": str(path)}, tta, views, tested, output, lines) if mode.ranks.is_main else DONE


@contextlib.contextmanager
def _counted(is_main: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that shows on a terminal how many batches of a model are tested."""
    with status_line() as show_line:

        def on_batch(done: int, total: int) -> None:
            if is_main:
                show_line(f"test: batch {done}/{total}" if done < total else "")

        yield on_batch


def _finish(
    source: Mapping[str, Any], tta: str, views: Any, tested: "Tested", folder: Path | str | None, lines: list[str]
) -> int:
    """Prints the metrics and writes them to `folder`, if any, with the `source` of the weights."""
    from dlopt.instruments import evaluation
    from dlopt.metrics.names import SPLITS, set_of

    is_averaged = views is not None or isinstance(source.get("checkpoint"), list)
    crops = {"name": tta, **({} if views is None else vars(views))}
    record = {**source, "tta": crops, "average": tested.average if is_averaged else None, "samples": tested.samples}
    lines.append(f"samples: {tested.samples:,}")
    record["split"] = SPLITS[tested.split]
    lines += [*tested.problems, *evaluation.set_lines(tested)]
    written: dict[str, Path] = {}
    if folder is not None:
        with writing(Path(folder)):
            written = evaluation.write(Path(folder), record, tested)
        lines += [f"{name}: {short_path(path)}" for name, path in written.items()]
    from dlopt.tracking.console import ConsoleView

    epoch = {"best_epoch": source["epoch"]} if isinstance(source.get("epoch"), int | float) else {}
    metrics = {key: value for key, value in tested.report.metrics.items() if not set_of(key, tested.sets)}
    shown = replace(tested.report, metrics=metrics)
    ConsoleView().finish({"status": "tested", **epoch}, lines, shown, tested.classes or ())
    files = [os.path.abspath(path) for path in written.values()]
    show_result({**record, **tested.report.metrics, "classes": tested.per_class, "files": files})
    return DONE


def _views(tta: str, changes: dict[str, Any]) -> Any:
    """Builds the test-time augmentation and removes its keys from `changes`; None for tta=none."""
    from dlopt.training.tta import CHOICES

    keys = {key: changes.pop(key) for key in list(changes) if key.startswith("tta.")}
    if tta != "none":
        from dlopt.config.schema import check_arguments

        target = CHOICES[tta]
        return target(**check_arguments("tta", target, {key[4:]: value for key, value in keys.items()}))
    for key, value in keys.items():
        raise UserError(f"{key}={show(value)}: unknown key of tta=none; use tta={'|'.join(CHOICES)}")
    return None
