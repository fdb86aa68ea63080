"""The laws: what holds of every row to which they apply. Each fails with the values that break it."""

import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import dlopt
from dlopt.metrics.declared import DECLARED
from dlopt.metrics.shown import format_metric
from dlopt.training.checkpoint.checkpoints import load
from tests.support.crossings import plain
from tests.support.crossings.features import DEFAULTS, FEATURES, KIND, TABLES, overrides
from tests.support.crossings.trial import (
    Ended,
    RefusedError,
    Trial,
    check_close,
    check_same,
    command,
    in_process,
    is_close,
    results,
    summary,
    weights,
)
from tests.support.recorded import SimulatedRecorder, capturing
from tests.support.runs import at_update, metrics, same, terminate

EXACT, ROUNDING = 1e-12, 1e-9


@dataclass(frozen=True)
class Law:
    """A law. `is_slow`: it needs several processes of its own."""

    check: Callable[[Trial], None]
    applies: Callable[[Trial], bool] = lambda trial: True
    is_slow: bool = False

    @property
    def name(self) -> str:
        return self.check.__name__


# -- a run and itself


def resumes(trial: Trial) -> None:
    """Killed after a random update, or stopped by a signal, and resumed: bit for bit the uninterrupted run."""
    update = trial.draw.randrange(1, max(trial.summary["steps"], 2))
    folder, by_signal = trial.place / "resumed", trial.draw.random() < 0.5
    kill = terminate if by_signal else lambda: os.kill(os.getpid(), signal.SIGKILL)
    words = ["train", *trial.words, f"output={folder}"]
    ended = trial.dlopt(*words, around=at_update(update, kill))
    # The signal may come when the run has nothing left to do.
    assert ended.code in ((75, 0) if by_signal else (-9,)), f"exit code {ended.code}: {ended.output[-500:]}"
    ended = trial.dlopt(*words, "resume=auto")
    how = "stopped" if by_signal else "killed"
    assert ended.code == 0, f"{how} after update {update}: {ended.output[-500:]}"
    try:
        check_same(trial.run, folder)
    except AssertionError as error:
        raise AssertionError(f"{how} after update {update}: {error}") from None


def same_from_python(trial: Trial) -> None:
    """`dlopt.train` is `dlopt train`."""
    ended = in_process(lambda: dlopt.train([*trial.words, f"output={trial.place / 'python'}"]), trial.place).wait()
    assert ended.code == 0, ended.output[-700:]
    check_same(trial.run, trial.place / "python")


def trains_again(trial: Trial) -> None:
    """The saved config trains again: `from=RUN`."""
    packages = [word for word in trial.words if word.startswith("allow_packages=")]
    again = trial.train("again", [f"from={trial.run}", *packages])
    check_same(trial.run, again)


def plain_torch(trial: Trial) -> None:
    """The run is a loop in plain torch, as far as that expresses its features."""
    trial = trial.narrowed(plain.FEATURES, "plain")
    state = load(trial.pure / "checkpoints" / "last.pt")
    progress, steps, epochs = state.state["progress"], state.step, state.config["schedule_epochs"]
    length = progress["length"]
    horizon = length["horizon"] if epochs is None else epochs * length["per_epoch"]
    words = trial.with_words("precision=fp64")
    ended = in_process(lambda: plain.train(trial.row, words, steps, horizon, trial.place), trial.place).wait()
    assert ended.code == 0, ended.output[-700:]
    _check_weights(weights(trial.pure), torch.load(trial.place / "plain.pt"), ROUNDING)


_KEEPING = {  # rounding errors of double precision grow little
    "optimizer": ("sgd", "nesterov", "adamw", "sam", "schedule_free", "adafactor"),
    "precision": ("fp32", "fp64"),
}


_CAPTURABLE = ("sgd", "nesterov", "adamw")
_CAPTURED = {
    "precision": ("fp32", "fp64"),
    "accumulate": ("1", "2"),
    "recompute": ("none",),
    "divergence": ("stop",),
    "diagnostics": ("none",),
    "observer": ("none",),
    "weight": ("none",),
}


def _keeping(trial: Trial) -> dict[str, tuple[str, ...]]:
    """Without Adafactor for attention: the gradient of the keys' bias is rounding alone, which Adafactor scales."""
    if trial.kind not in ("vit", "gpt"):
        return _KEEPING
    return _KEEPING | {"optimizer": tuple(name for name in _KEEPING["optimizer"] if name != "adafactor")}


def _together_with(trial: Trial) -> dict[str, tuple[str, ...]]:
    return _keeping(trial) | {"tta": ("none",)}


def accumulates(trial: Trial) -> None:
    """Two micro-batches are one batch, without batch norm, and without dropout, which draws for each of them."""
    without = {"norm": ("kind's", "layer"), "dropout": ("0",), "accumulate": ("1", "2")}
    trial = trial.narrowed(_keeping(trial) | without, "micro-batches")
    one = trial.train("full", trial.with_words("precision=fp64", "accumulate=1"))
    two = trial.train("accumulated", trial.with_words("precision=fp64", "accumulate=2"))
    check_close(one, two, ROUNDING)


def two_processes(trial: Trial) -> None:
    """Two processes are one."""
    trial = trial.narrowed(_together_with(trial), "processes")
    check_close(trial.pure, _in_two(trial, "two"), ROUNDING)


def resumes_in_one(trial: Trial) -> None:
    """Two processes, killed after a random update, and resumed by one: the run of one process."""
    trial = trial.narrowed(_together_with(trial), "alone")
    update = trial.draw.randrange(1, max(summary(trial.pure)["steps"], 2))
    folder = _in_two(trial, "two", update)
    ended = trial.dlopt("train", *_together(trial), f"output={folder}", "parallel=single", "resume=auto")
    assert ended.code == 0, f"killed after update {update}: {ended.output[-700:]}"
    check_close(trial.pure, folder, ROUNDING)


def compresses(trial: Trial) -> None:
    """PowerSGD's first ten updates are exact; gradients in bf16 are those of one process, up to its precision."""
    trial = trial.narrowed(_together_with(trial), "compressed")
    choice = trial.draw.choice(["powersgd", "bf16"])
    folder = _in_two(trial, choice, words=[f"parallel.compression={choice}"])
    if choice == "bf16":
        lines = [metrics(each)[-1]["train_loss"] for each in (trial.pure, folder)]
        assert is_close(lines[0], lines[1], 0.02), f"bf16: train_loss {lines[0]} and {lines[1]}"
    elif summary(folder)["steps"] <= 10:
        check_close(trial.pure, folder, ROUNDING)


def branches(trial: Trial) -> None:
    """A branch of a longer run is the straight run.

    If no later epoch is better, its best checkpoint is one of the longer run, and says of which length that was.
    """
    longer = trial.train("longer", trial.with_words("epochs=4"))
    straight = trial.train("straight", trial.with_words("epochs=2"))
    words = [f"from={longer}", "at=2", "hydra/launcher=serial", f"output={trial.place / 'branches'}"]
    packages = [word for word in trial.words if word.startswith("allow_packages=")]
    _done(trial.dlopt("train", "-m", *words, *packages))
    check_same(straight, trial.place / "branches" / "0", but=["length"])


def job_of_a_sweep(trial: Trial) -> None:
    """A job of a sweep is the run alone."""
    words = trial.with_words("order_seed=0,7", "hydra/launcher=serial")
    _done(trial.dlopt("train", "-m", *words, f"output={trial.place / 'sweep'}"))
    alone = trial.train("alone", trial.with_words("order_seed=7"))
    check_same(alone, trial.place / "sweep" / "1")


def trial_of_a_search(trial: Trial) -> None:
    """A job of drawn trials with several seeds is the run alone."""
    name = next(word.partition("=")[2] for word in trial.words if word.startswith("model="))
    space = trial.place / "space.yaml"
    space.parent.mkdir(parents=True, exist_ok=True)
    space.write_text(f"model={name}:\n  optimizer.lr: tag(log,interval(0.01,0.03))\n")
    words = [word for word in trial.words if not word.startswith("optimizer.lr=")]
    folder = trial.place / "search"
    options = [f"space={space}", "trials=2", "seeds=2", "hydra/launcher=serial", f"output={folder}"]
    _done(trial.dlopt("train", "-m", *words, *options))
    jobs = sorted(each.name for each in folder.iterdir() if each.name.isdigit())
    assert jobs == ["0", "1", "2", "3"], f"jobs {', '.join(jobs)}"
    job = folder / trial.draw.choice(jobs)
    lines = (job / "overrides.yaml").read_text().splitlines()
    drawn = [line[2:] for line in lines if line.startswith(("- optimizer.lr=", "- seed="))]
    assert len(drawn) == 2, f"overrides.yaml: {', '.join(lines)}"
    check_same(trial.train("drawn", [*words, *drawn]), job)


def judges(trial: Trial) -> None:
    """`dlopt judge` comes to a verdict."""
    words = [word for word in trial.words if not word.startswith("allow_packages=")]
    change = ["optimizer.lr=0.01", "seeds=7", f"output={trial.place / 'judge'}", *_packages(trial)]
    ended = trial.dlopt("judge", " ".join(words), *change)
    _done(ended, (0, 3, 4))


def captured(trial: Trial) -> None:
    """Updates and batches replayed from simulated graphs, whose rates have single precision, are eager ones."""
    trial, recorder = trial.narrowed(_CAPTURED, "eager"), SimulatedRecorder()

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        try:
            with capturing(recorder):
                yield
        finally:
            if recorder.replayed:
                print("replayed")

    folder = trial.train("captured", trial.with_words("precision=fp64"), around=around())
    check_close(trial.pure, folder, 1e-6)
    assert "replayed" in trial.outputs["captured"] or summary(folder)["steps"] < 6, "no replays"


def compiled(trial: Trial) -> None:
    """`compile=blocks` changes no number, without dropout, of which a compiler draws other masks."""
    trial = trial.narrowed(_keeping(trial) | {"dropout": ("0",)}, "compiled")
    words = trial.with_words("precision=fp64", "compile=blocks")
    check_close(trial.pure, trial.train("blocks", words), ROUNDING)


# -- a run and its model


def evaluated_as_logged(trial: Trial) -> None:
    """Evaluating a checkpoint gives its line of metrics.jsonl, and that of the best model the test.

    Not of a validation on a subset: `dlopt eval` reads the whole set.
    """
    names = ["last.pt", "best.pt"] if trial.summary["best_epoch"] is not None else ["last.pt"]
    has_val = _has_val(trial) and not trial.has("validation", "samples")
    for name in names:
        found = _evaluate(trial, f"checkpoint={trial.run / 'checkpoints' / name}", "split=val") if has_val else {}
        lines = metrics(trial.run)
        line = lines[-1] if name == "last.pt" else next(
            (each for each in lines if each["epoch"] == trial.summary["best_epoch"]), {}
        )  # fmt: skip
        if has_val:
            _compare(line, found, "val", name)
    if trial.summary["test_loss"] is not None:
        tta = ["tta=flip"] if trial.has("tta", "flip") else []
        _compare(trial.summary, _evaluate(trial, str(trial.run), "split=test", *tta), "test", "test")


def predicted_as_evaluated(trial: Trial) -> None:
    """What `predict` writes, counted, is what `eval` says, with the running statistics; else `predict` says so.

    In bf16 up to its rounding: `predict` has other batches, and the weights of adapters merged.
    """
    tested = _evaluate(trial, str(trial.run), "split=test", "norm_statistics=running")
    is_bf16 = _is_bf16(trial)
    ended, rows = _predict(trial, trial.run)
    assert ("norm_statistics=exact" in ended.output) == trial.has("statistics", "exact"), ended.output
    if trial.kind != "regression":
        accuracy = _accuracy(rows)
        tolerance = 1.5 / len(rows) if is_bf16 else EXACT
        assert abs(tested["test_accuracy"] - accuracy) <= tolerance, f"{tested['test_accuracy']} and {accuracy}"
    else:
        targets = [float(row["target"]) for row in rows]
        residuals = [float(row["prediction"]) - target for row, target in zip(rows, targets, strict=True)]
        mean = sum(targets) / len(targets)
        r2 = 1 - sum(r * r for r in residuals) / sum((target - mean) ** 2 for target in targets)
        assert is_close(tested["test_r2"], r2, 0.02 if is_bf16 else 1e-5), f"r2 {tested['test_r2']} and {r2}"


def predicted_as_decided(trial: Trial) -> None:
    """What `predict` writes, counted, is what decision.json says of the test set, in bf16 up to its rounding."""
    folder = trial.place / "decided"
    shutil.copytree(trial.run, folder)
    rule = "f1" if trial.kind == "binary" else "most_probable"
    more = ["norm_statistics=running", f"output={trial.place / 'decision'}"]
    _done(trial.dlopt("eval", str(folder), f"threshold={rule}", *more, *_packages(trial)))
    decision = json.loads((folder / "checkpoints" / "decision.json").read_text())
    _, rows = _predict(trial, folder)
    tested = decision["test_after"]
    found = {
        "accuracy": _accuracy(rows),
        "log_loss": -sum(math.log(max(float(row[f"p({row['class']})"]), 1e-300)) for row in rows) / len(rows),
    }
    if rule == "f1":
        hits = sum(row["prediction"] == row["class"] == "yes" for row in rows)
        sizes = [sum(row[column] == "yes" for row in rows) for column in ("prediction", "class")]
        found["f1"] = 2 * hits / sum(sizes)
    tolerances = {"log_loss": 0.02} if _is_bf16(trial) else {"log_loss": 1e-6}
    for name, value in found.items():
        tolerance = tolerances.get(name, 2.5 / len(rows) if _is_bf16(trial) else EXACT)
        assert is_close(tested[name], value, tolerance), f"{rule}: {name} {tested[name]} and {value} by predict"


def exported_as_predicted(trial: Trial) -> None:
    """An ONNX graph with the preprocessing says of 200 inputs what `predict` says; `export` compares them."""
    words = ["format=onnx", "include=preprocessing", f"output={trial.place / 'model.onnx'}", *_packages(trial)]
    ended = trial.dlopt("export", str(trial.run), *words)
    _done(ended)
    assert "verified: outputs match those of `dlopt predict" in ended.output, ended.output[-500:]


def parquet_as_csv(trial: Trial) -> None:
    """The same table in Parquet gives the same run."""
    [word] = [word for word in trial.words if word.startswith("data.file=")]
    check_same(trial.run, trial.train("parquet", trial.with_words(word.replace(".csv", ".parquet"))))


def images_in_other_files(trial: Trial) -> None:
    """The same images in a list, in Parquet or in tar shards give the run of those in class folders."""
    folder, splits = trial.files / "images", (("file", "train"), ("val_file", "val"), ("test_file", "test"))

    def shards(suffix: str) -> list[str]:
        return [f"data.{key}={folder / 'shards' / split}.{suffix}" for key, split in splits]

    kinds = {
        "csv": ["data=csv", f"data.file={folder / 'list.csv'}", "data.split_column=split"],
        "parquet": ["data=parquet", *shards("parquet")],
        "webdataset": ["data=webdataset", "data.input=png", *shards("tar")],
    }
    kind = trial.draw.choice([*kinds])
    words = [word for word in trial.words if not word.startswith(("data=", "data.root="))]
    other = trial.train(kind, [*words, *kinds[kind], "data.channels=3"])
    try:
        check_close(trial.run, other, 1e-15)
    except AssertionError as error:
        raise AssertionError(f"{kind}: {error}") from None


def tensors_as_csv(trial: Trial) -> None:
    """The same numbers as a data set of the user give the same run."""
    data = ["data=custom", "data.standardize_target=true"]
    for split in ("train", "val", "test"):
        target = f"data.{split}._target_=tests.support.crossings.own_data.Numbers"
        data += [target, f"+data.{split}.file={trial.files / 'values.csv'}", f"+data.{split}.split={split}"]
    table = ("data=", *(f"data.{key}=" for key in ("file", "labels", "split_column", "ignore", "group", "order")))
    table += ("allow_packages",)
    words = [word for word in trial.words if not word.startswith(table)]
    other = trial.train("tensors", [*words, *data, "allow_packages=[tests]"])
    # The values were scaled in float64 and in float32; a basis of eigenvectors, for example, amplifies what differs.
    is_exact = trial.has("precision", "fp32", "fp64") and trial.has("optimizer", *_KEEPING["optimizer"])
    check_close(trial.run, other, 1e-5 if is_exact else 1e-2)


# -- what a run says


def measures_what_is_requested(trial: Trial) -> None:
    """Every requested metric is one finite number: in metrics.jsonl, summary.json, the table, the page, and CSV."""
    [requested] = [
        word.partition("=")[2].strip("[]").split(",") for word in trial.words if word.startswith("evaluate.metrics=")
    ]
    names = [name.rpartition(".")[2] for name in requested]
    columns = [each for name in names for each in (DECLARED[name].names if name in DECLARED else (name,))]
    columns = ["worst_class_accuracy" if each == "class_accuracy" else each for each in columns]
    sets = ["", "other_"] if trial.has("validation", "two") else [""]
    for number, line in enumerate(metrics(trial.run), 1):
        for name in (f"val_{each}{name}" for each in sets for name in columns):
            if any(key.startswith("val_") for key in line):
                assert math.isfinite(line.get(name, math.nan)), f"{name} of line {number}: {line.get(name)}"
    printed = " ".join(trial.output.partition("best validation")[2].split())
    for name in columns:
        assert math.isfinite(trial.summary.get(f"test_{name}", math.nan)), f"summary.json: no test_{name}"
        assert math.isfinite(trial.summary.get(f"best_val_{name}", math.nan)), f"summary.json: no best_val_{name}"
        for key in (f"best_val_{name}", f"test_{name}"):
            shown = format_metric(key, trial.summary[key])
            assert shown in printed, f"printed: no {key} {shown} in {printed[:500]}"
    report = trial.place / "report"
    ended = trial.dlopt("report", str(trial.run), f"output={report}", "format=[html,csv]")
    assert ended.code == 0, ended.output[-700:]
    page = (report / "index.html").read_text()
    with (report / "summary.csv").open(newline="") as text:
        [row] = csv.DictReader(text)
    for name in columns:
        found = [value for key, value in row.items() if key.startswith(f"val_{name}") and value]
        assert found and math.isfinite(float(found[0])), f"summary.csv: val_{name} of {', '.join(row)}"
        assert f"val_{name}" in page, f"index.html: no val_{name}"


def every_key_acts(trial: Trial) -> None:
    """A feature without which the run is the same says so, unless its config is the same, too."""
    features = [f for f, v in trial.row.items() if f != KIND and v != DEFAULTS[f] and FEATURES[f][v].acts]
    if not trial.has("stopping", "none"):
        features = [each for each in features if each != "accumulate"]  # the run may end before its batch has grown
    # All samples make whole batches, or two thirds of them do.
    if trial.has("validation", "none") or (trial.has("folds", "second") and trial.kind not in TABLES):
        features = [each for each in features if each != "reading"]
    if not features:
        return
    order = trial.draw.sample([*FEATURES], len(FEATURES))  # of all: the same for the smaller rows that break the law
    feature = min(features, key=order.index)
    value = FEATURES[feature][trial.row[feature]]
    without = overrides({**trial.row, feature: DEFAULTS[feature]}, trial.files)
    other = trial.train("without", without)
    lines = [results(each) for each in (trial.run, other)]
    tests = [{key: value for key, value in each[-1].items() if key.startswith("test_")} for each in lines]
    of_models = [weights(each) for each in (trial.run, other)]
    averages = [load(each / "checkpoints" / "last.pt").evaluated_weights for each in (trial.run, other)]
    is_same = lines[0][:-1] == lines[1][:-1] and tests[0] == tests[1] and same(*of_models) and same(*averages)
    keys = [word.partition("=")[0] for word in value.words.split()]
    is_said = any(key in line for key in keys for line in _said(trial))
    configs = [{**load(each / "checkpoints" / "last.pt").config, "run_id": ""} for each in (trial.run, other)]
    is_default = configs[0] == configs[1]  # normalize=none of a text
    assert not is_same or is_said or is_default, f"{value.words}: changes nothing, and nothing says so"


def header_counts(trial: Trial) -> None:
    """The header's numbers are the run's."""
    header = " ".join(trial.output.split())
    [parameters] = [int(each.replace(",", "")) for each in re.findall(r"model .*? ([0-9,]+) parameters", header)[:1]]
    assert parameters == trial.summary["parameters"], f"{parameters} and {trial.summary['parameters']} parameters"
    if trial.has("length", "epochs") and trial.has("stopping", "none") and not trial.has("accumulate", "grows"):
        [(epochs, steps)] = re.findall(r"(\d+) epochs? of (\d+) steps?", header)[:1]
        assert int(epochs) * int(steps) == trial.summary["steps"], f"{epochs} x {steps}, {trial.summary['steps']} steps"
    if trial.summary["test_loss"] is not None and trial.kind not in ("gpt", "own"):
        found = _evaluate(trial, str(trial.run), "split=test")
        [count] = [_number(each) for each in re.findall(r" ([0-9,]+) test\b", header)[:1]]
        assert count == found["samples"], f"{count} and {found['samples']} test samples"


# -- helpers


def _said(trial: Trial) -> list[str]:
    """Returns the lines that the run has printed, without the command line at their head."""
    lines = trial.output.splitlines()
    return lines[next(place for place, line in enumerate(lines) if line.startswith("data ")) :]


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _done(ended: Ended, codes: Sequence[int] = (0,)) -> None:
    """Fails if a command has not ended with one of the codes; raises `RefusedError` if it was refused."""
    if ended.refusal is not None:
        raise RefusedError(ended.refusal)
    assert ended.code in codes, f"exit code {ended.code}: {ended.output[-700:]}"


def _together(trial: Trial) -> list[str]:
    return trial.with_words("precision=fp64")


def _in_two(trial: Trial, name: str, killed_after: int | None = None, words: Iterable[str] = ()) -> Path:
    """Trains in the folder `name` with two processes, which are killed after an update. Returns the folder."""
    folder, more = trial.place / name, ["parallel=ddp", "parallel.sync_batchnorm=true"]
    line = ["train", *_together(trial), *more, *words, f"output={folder}"]
    store = {"DLOPT_PROCESSES": "2", "DLOPT_STORE": str(trial.place / f"store of {name}")}

    def around() -> AbstractContextManager[object]:
        if killed_after is None:
            return contextlib.nullcontext()
        return at_update(killed_after, lambda: os.kill(os.getpid(), signal.SIGKILL))

    ranks = [
        in_process(command(line, around()), trial.place / f"{name}{rank}", store | {"DLOPT_RANK": str(rank)})
        for rank in (0, 1)
    ]
    ended = [rank.wait() for rank in ranks]
    for each in ended:
        assert "Traceback" not in each.output or killed_after is not None, each.output[-1500:]
    if (refusal := next((each.refusal for each in ended if each.refusal), None)) is not None:
        raise RefusedError(refusal)
    if killed_after is None:
        assert [each.code for each in ended] == [0, 0], ended[0].output[-700:]
    else:
        assert -signal.SIGKILL in [each.code for each in ended], ended[0].output[-700:]
    return folder


def _predict(trial: Trial, folder: Path) -> tuple[Ended, list[dict[str, str]]]:
    """Predicts the test set. Returns what `predict` has said and its rows; the class of an image is its `class`."""
    output = folder / "predictions.csv"
    files = {"regression": "values.csv", "table": "classes.csv", "binary": "binary.csv"}
    if trial.kind == "folder":
        what = [f"images={trial.files / 'images' / 'test'}"]
    else:
        what = [
            f"file={trial.files / files[trial.kind]}",
            *(["probabilities=all"] if trial.kind != "regression" else []),
        ]
    ended = trial.dlopt("predict", str(folder), *what, f"output={output}", *_packages(trial))
    assert ended.code == 0, ended.output[-700:]
    with output.open(newline="") as text:
        rows = [*csv.DictReader(text)]
    if trial.kind != "folder":
        return ended, [row for row in rows if row["split"] == "test"]
    return ended, [row | {"prediction": row["class"], "class": Path(row["image"]).parent.name} for row in rows]


def _is_bf16(trial: Trial) -> bool:
    return not trial.has("precision", "fp32", "fp64")


def _accuracy(rows: Sequence[dict[str, str]]) -> float:
    return sum(row["prediction"] == row["class"] for row in rows) / len(rows)


def _packages(trial: Trial) -> list[str]:
    return [word for word in trial.words if word.startswith("allow_packages=")]


def _evaluate(trial: Trial, *words: str) -> dict[str, Any]:
    """Returns what `dlopt eval` writes; it runs once for equal words."""
    folder = trial.place / re.sub(r"\W", "_", "eval " + " ".join(words).replace(str(trial.place), ""))
    if not folder.exists():
        # The pictures take as long as the rest: those of the test set are enough.
        around = patch("matplotlib.figure.Figure.savefig") if "split=val" in words else contextlib.nullcontext()
        ended: Ended = trial.dlopt("eval", *words, f"output={folder}", *_packages(trial), around=around)
        assert ended.code == 0, f"dlopt eval: {ended.output[-500:]}"
    found: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return found


def _compare(logged: dict[str, Any], found: dict[str, Any], split: str, what: str) -> None:
    for key, value in logged.items():
        if key.startswith(f"{split}_") and value is not None and "/" not in key:
            assert key in found, f"{what}: eval does not say {key}"
            assert is_close(value, found[key], 1e-6), f"{what}: {key} {value} in the run, {found[key]} by eval"


def _check_weights(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            distance = float((found[name].double() - tensor.double()).abs().max())
            assert distance <= tolerance * (1 + float(tensor.abs().max())), f"{name} differs by {distance:.2g}"


def _has_val(trial: Trial) -> bool:
    return not trial.has("validation", "none")


def _predicts(trial: Trial) -> bool:
    """Whether the test set is that of the files."""
    return trial.kind in (*TABLES, "folder") and trial.has("split", "kind's")


LAWS = (
    Law(resumes),
    Law(same_from_python),
    Law(trains_again),
    Law(plain_torch, lambda trial: trial.kind in plain.FEATURES[KIND]),
    Law(accumulates, lambda trial: trial.kind != "resnet"),
    Law(captured, lambda trial: trial.has("optimizer", *_CAPTURABLE) and trial.kind not in ("recurrent", "own")),
    Law(evaluated_as_logged),
    Law(predicted_as_evaluated, _predicts),
    Law(predicted_as_decided, lambda trial: _predicts(trial) and trial.kind != "regression"),
    Law(parquet_as_csv, lambda trial: trial.kind in TABLES),
    Law(images_in_other_files, lambda trial: trial.kind == "folder" and trial.has("split", "kind's")),
    Law(
        tensors_as_csv,
        lambda trial: trial.kind == "regression" and trial.has("split", "kind's") and trial.has("weight", "none"),
    ),
    Law(measures_what_is_requested, lambda trial: not trial.has("metrics", "usual") and _has_val(trial)),
    Law(every_key_acts),
    Law(header_counts),
    Law(exported_as_predicted, lambda trial: trial.kind in (*TABLES, "folder"), is_slow=True),
    Law(two_processes, is_slow=True),
    Law(resumes_in_one, is_slow=True),
    Law(compresses, is_slow=True),
    Law(branches, lambda trial: trial.has("schedule", "wsd") and trial.has("length", "epochs"), is_slow=True),
    Law(job_of_a_sweep, lambda trial: trial.has("seeds", "one"), is_slow=True),
    Law(trial_of_a_search, lambda trial: trial.has("seeds", "one"), is_slow=True),
    Law(judges, lambda trial: trial.has("seeds", "one"), is_slow=True),
    Law(compiled, lambda trial: trial.kind in ("vit", "gpt", "resnet"), is_slow=True),
)
