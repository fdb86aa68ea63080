"""Tests of requesting and monitoring metrics, in runs and by `dlopt eval`."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_percent
from dlopt.data.samples import Dataset, InMemory
from dlopt.metrics.declared import REQUESTABLE
from dlopt.tasks.classification import Classification
from dlopt.tasks.labels import MultiLabel
from dlopt.tasks.regression import Regression
from dlopt.tracking.terminal_text import format_result
from dlopt.training.builders.dataset import read_source, with_task
from dlopt.training.requested_metrics import _check_names, check_objective, requested_metrics
from tests.support.line import dlopt
from tests.support.runs import REGRESSION, metrics, run_config, start
from tests.support.sizes import SMALL, without

PARTS = "tests.support.user_parts"
OWN = f"{PARTS}.squared_error"


def test_best_model_follows_the_monitored_metric(tmp_path: Path) -> None:
    keys = ["epochs=4", "schedule=constant", "optimizer.lr=0.3", "monitor=val_calibration_error"]
    summary = start(tmp_path, *SMALL, *keys, "evaluate.metrics=[class_accuracy,macro_f1]")
    lines = metrics(tmp_path)
    errors = [line["val_calibration_error"] for line in lines]
    assert summary["best_epoch"] == 1 + errors.index(min(errors))
    assert summary["best_val_calibration_error"] == min(errors)
    assert all(0 <= line["val_worst_class_accuracy"] <= line["val_accuracy"] for line in lines)
    assert (
        min(v for k, v in lines[0].items() if k.startswith("val_class_accuracy/"))
        == (lines[0]["val_worst_class_accuracy"])
    )


def test_regression_may_monitor_its_metrics(tmp_path: Path) -> None:
    start(tmp_path, *REGRESSION, "monitor=val_r2", "stopping=early", "evaluate.metrics=[mae]", "epochs=2")
    assert {"val_r2", "val_mae"} <= set(metrics(tmp_path)[0])


PERCENT = r"stopping\.value=95: val_.* is at most 1; for 95 % set 0\.95"  # displayed in percent: it is never reached
BAD = {  # of a classification
    "monitor=val_class_accuracy/11": "no class 11",
    "evaluate.metrics=[r2]": "evaluate.metrics=r2: a classification",
    "stopping=early stopping.monitor=val_mae": "stopping.monitor=val_mae: a classification",
    "schedule=plateau schedule.monitor=val_r2": "schedule.monitor=val_r2: a classification",
    "schedule=plateau schedule.monitor=val_macro_f1/3": "schedule.monitor=val_macro_f1/3: a classification task has no",
    "schedule=plateau schedule.monitor=val_worst_class_accuracy/3": "a classification task has no such metric",
    "schedule=plateau data.val_split=0": "schedule=plateau: needs a validation",
    "monitor=val_loss data.val_split=0": "monitor=val_loss: needs a validation",
    "evaluate.metrics=[macro_f1,class_accuracy] data.val_split=0": r"=\[macro_f1,class_accuracy\]: needs a validation",
    "stopping=target stopping.value=1 data.val_split=0": "stopping=target: needs a validation",
    "stopping=target stopping.value=95 stopping.monitor=auto": PERCENT,
    "stopping=target stopping.value=95 stopping.monitor=val_accuracy": PERCENT,
    "stopping=target stopping.value=95 stopping.monitor=val_macro_f1": PERCENT,
}
BAD_OF_REGRESSION = {
    "schedule=plateau schedule.monitor=val_foo": r"schedule\.monitor=val_foo: a regression task has no such metric",
    "monitor=val_accuracy": "monitor=val_accuracy.*regression",
    "monitor=val_macro_f1": "monitor=val_macro_f1.*regression",
}


@pytest.mark.parametrize("line", BAD | BAD_OF_REGRESSION)
def test_rejects_unavailable_metrics(tmp_path: Path, line: str) -> None:
    base = SMALL if line in BAD else REGRESSION
    with pytest.raises(UserError, match=(BAD | BAD_OF_REGRESSION)[line]):
        start(tmp_path, *base, *line.split())


def test_rejects_a_class_without_validation_samples() -> None:
    checked = run_config(*SMALL, "monitor=val_class_accuracy/b")
    train, val = (InMemory(torch.zeros(2, 3), torch.tensor(labels)) for labels in ([0, 1], [0, 0]))
    with pytest.raises(UserError, match="monitor=val_class_accuracy/b: the validation set has no sample"):
        requested_metrics(checked, Dataset(train, val, None, ("a", "b")))


def test_top5_needs_more_than_five_classes() -> None:
    with pytest.raises(UserError, match="needs more than 5 classes"):
        _check_names({"top5_accuracy": "monitor=val_top5_accuracy"}, Classification(5))


def test_the_epoch_of_an_early_stop_is_evaluated(tmp_path: Path) -> None:
    stop = ["stopping=tolerance", "stopping.tolerance=1e9", "stopping.iterations=4"]
    summary = start(tmp_path, *SMALL, *stop, "epochs=9", "evaluate.every_epochs=5")
    [line] = metrics(tmp_path)
    assert summary["status"] == "stopped_early" and line["epoch"] == 2 and line["val_loss"] > 0


OBJECTIVES: dict[str, tuple[list[str], list[str], str]] = {
    "labels": (
        [*SMALL, "evaluate.metrics=[class_accuracy]", "stopping=early", "stopping.monitor=val_macro_f1"],
        ["best_val_class_accuracy/3", "best_val_worst_class_accuracy", "best_val_macro_f1", "steps"],
        "best_val_r2",
    ),
    "regression": ([*REGRESSION, "monitor=val_r2"], ["best_val_r2", "best_val_loss", "seconds"], "best_val_accuracy"),
    "text": (
        ["data=python_source", "model=gpt_nano", "device=cpu"],
        ["best_val_bits_per_byte", "best_val_token_accuracy"], "best_val_accuracy",
    ),
    "reconstruction": (
        [*without(SMALL, "model"), "model=autoencoder"], ["best_val_loss", "parameters"], "best_val_accuracy",
    ),
    "named": (
        [*SMALL, "data.val_split=0", "+validation.whole.use=test", "monitor=val_whole_macro_f1"],
        ["best_val_whole_macro_f1", "best_val_whole_loss"], "best_val_other_loss",
    ),
    "own": (
        [*SMALL, f"evaluate.metrics=[{OWN}]", f"allow_packages=[{PARTS}]"], ["best_val_squared_error"], "best_val_f2",
    ),
    "no class": ([*SMALL, "evaluate.metrics=[class_accuracy]"], [], "best_val_class_accuracy/11"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_those_of_the_summary(name: str, tmp_path: Path) -> None:
    """Of every kind of task: a search may select by what the summary of such a run has, and by nothing else."""
    keys, allowed, refused = OBJECTIVES[name]
    checked = run_config(*keys)
    source = read_source(checked)
    dataset = with_task(checked, source, source.train.shape)
    for key in allowed:
        check_objective("objective", key, checked, dataset)
    with pytest.raises(UserError, match=r"^objective"):
        check_objective("objective", refused, checked, dataset)
    if name != "text":
        summary = start(tmp_path, *keys, "epochs=1")
        assert {*allowed} <= summary.keys() and refused not in summary


def test_the_summary_has_all_metrics_of_the_best_epoch(tmp_path: Path) -> None:
    requested = f"evaluate.metrics=[matthews_correlation,class_accuracy,{OWN}]"
    keys = [*SMALL, requested, f"allow_packages=[{PARTS}]", "epochs=3", "monitor=val_macro_f1", "optimizer.lr=0.3"]
    summary = start(tmp_path, *keys)
    lines = {line["epoch"]: line for line in metrics(tmp_path)}
    best = {f"best_{key}": value for key, value in lines[summary["best_epoch"]].items() if key.startswith("val_")}
    assert len(best) == 2 + 3 + len([key for key in best if "class_accuracy" in key]) > 12
    assert {key: value for key, value in summary.items() if key.startswith("best_val_")} == best
    table = format_result(summary)
    printed = Console(width=400, file=(out := io.StringIO()))
    printed.print(table)
    row = next(line for line in out.getvalue().splitlines() if line.startswith("best validation"))
    assert " - " not in row and f"{best['best_val_matthews_correlation']:.4f}" in row
    assert f"{format_percent(best['best_val_class_accuracy/3'])} " in row


DATA_OF = {
    "classification": (*SMALL, "data.subset=200"),
    "regression": (*SMALL, "data=diabetes", "loss=mse", "data.subset=200"),
    "multi-label": (*SMALL, "data=digit_pairs", "data.train_size=200", "data.val_size=0"),
}


# What `evaluate.metrics` takes, by task.
REQUESTED = {each.kind: [m.name for m in each.metrics if m.needs] for each in (Classification, MultiLabel, Regression)}


def test_every_metric_that_may_be_requested_is_of_a_task() -> None:
    assert {name for names in REQUESTED.values() for name in names} == set(REQUESTABLE)


@pytest.mark.parametrize("tta", ["none", "flip"])
@pytest.mark.parametrize("kind", REQUESTED)
def test_every_metric_that_is_validated_is_tested(tmp_path: Path, kind: str, tta: str) -> None:
    """With an average of the weights, too; `dlopt eval` computes the same from all outputs: test_declared has them."""
    if tta != "none" and kind == "regression":
        pytest.skip("its inputs are not images")
    names = REQUESTED[kind]
    lines = [*DATA_OF[kind], "epochs=2", "ema=0.9", f"evaluate.metrics=[{','.join(names)}]", f"evaluate.tta={tta}"]
    average = ["average=logits"] if tta != "none" else []
    lines += [f"evaluate.{each}" for each in average]
    assert dlopt(tmp_path, "train", *lines, "hydra.run.dir=run").code == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    [*_, line] = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    validated = {key.removeprefix("val_") for key in line if key.startswith("val_")}
    tested = {key.removeprefix("test_"): value for key, value in summary.items() if key.startswith("test_")}
    assert {name.partition("/")[0] for name in validated} >= set(names)
    assert validated <= set(tested)
    assert dlopt(tmp_path, "eval", "checkpoint=run", f"tta={tta}", *average).code == 0
    found = json.loads((tmp_path / "run/eval.json").read_text())
    for name in validated:
        assert found[f"test_{name}"] == pytest.approx(tested[name], rel=1e-6), name
