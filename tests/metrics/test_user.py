"""Metrics of the user's own: functions of all samples of a split."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dlopt.basics.errors import RunError, UserError
from dlopt.config.user_parts import user_metrics
from dlopt.results.ranking import gather
from dlopt.results.reading import RunReader
from dlopt.training.builders.workload import Workload, build_workload
from dlopt.training.checkpoint.checkpoints import load
from tests.support import user_parts
from tests.support.runs import REGRESSION, metrics, run_config, start
from tests.support.sizes import SMALL

OWN = "tests.support.user_parts."
TRUST = "allow_packages=[tests]"
CASE = [*SMALL, TRUST, f"evaluate.metrics=[macro_f1,{OWN}mean_rank_score]", "epochs=2"]


def loaded(folder: Path, *lines: str) -> Workload:
    workload = build_workload(run_config(*lines))
    workload.load(load(folder / "checkpoints/best.pt"))
    workload.module.eval()
    return workload


def test_equals_the_function_of_all_outputs(tmp_path: Path) -> None:
    """Of validation and test; the best model's line is the one of the epoch with the best monitored metric."""
    summary = start(tmp_path, *CASE, "monitor=val_mean_rank_score", "monitor_mode=max", "stopping=early")
    lines = metrics(tmp_path)
    best = max(lines, key=lambda line: line["val_mean_rank_score"])
    assert (summary["best_epoch"], summary["best_val_mean_rank_score"]) == (best["epoch"], best["val_mean_rank_score"])
    workload = loaded(tmp_path, *CASE)
    for split, value in (("val", best["val_mean_rank_score"]), ("test", summary["test_mean_rank_score"])):
        samples = getattr(workload.dataset, split)
        with torch.inference_mode():
            inputs = workload.normalize(samples.fetch(torch.arange(len(samples)))).float()
            expected = user_parts.mean_rank_score(workload.module(inputs), samples.targets)
        assert value == pytest.approx(expected, abs=1e-5), split
    assert "val_macro_f1" in lines[0]


def test_a_function_replaces_a_metric_of_tests(tmp_path: Path) -> None:
    """Runs may have it from before dlopt had a metric of this name."""
    for more in ([], ["evaluate.tta=flip"]):
        lines = [*SMALL, TRUST, f"evaluate.metrics=[{OWN}brier_score]", "epochs=1", *more]
        summary = start(tmp_path / str(len(more)), *lines)
        assert summary["test_brier_score"] == summary["best_val_brier_score"] == -7


def save_config(folder: Path, *lines: str) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(run_config(*lines).config)))


@pytest.mark.parametrize(("mode", "best"), [("min", min), ("max", max)])
def test_direction_of_a_users_metric(tmp_path: Path, mode: str, best: Any) -> None:
    """The kept epoch, the header, the report and a resumed run follow monitor_mode, whatever the name."""
    lines = [*CASE, "monitor=val_mean_rank_score", f"monitor_mode={mode}", "epochs=4"]
    summary = start(tmp_path, *lines)
    values = [line["val_mean_rank_score"] for line in metrics(tmp_path)]
    assert summary["best_val_mean_rank_score"] == best(values) and len(set(values)) > 1
    kept = f"keeps the {'lowest' if mode == 'min' else 'highest'} val_mean_rank_score"
    assert kept in (tmp_path / "train.log").read_text()
    save_config(tmp_path, *lines)
    records, damaged = RunReader().read([tmp_path])
    assert gather(records, damaged, "val_mean_rank_score").lower == (mode == "min")
    assert records[0].metrics["val_mean_rank_score"] == best(values)


def test_no_ranking_by_a_metric_without_a_direction(tmp_path: Path) -> None:
    start(tmp_path, *CASE, "epochs=1")
    save_config(tmp_path, *CASE)
    records, damaged = RunReader().read([tmp_path])
    with pytest.raises(UserError, match="by=val_mean_rank_score: no run says whether smaller or larger"):
        gather(records, damaged, "val_mean_rank_score")


def test_a_regression_with_test_time_augmentation_off(tmp_path: Path) -> None:
    """The loss is the mean squared error, so this metric equals it; NumPy's number is one."""
    summary = start(tmp_path, *REGRESSION, f"evaluate.metrics=[{OWN}squared_error,{OWN}spread]", "epochs=1")
    [line] = metrics(tmp_path)
    assert line["val_squared_error"] == pytest.approx(line["val_loss"], rel=1e-5)
    assert summary["test_squared_error"] == pytest.approx(summary["test_loss"], rel=1e-5)
    assert line["val_spread"] > 0


def test_with_crops(tmp_path: Path) -> None:
    lines = [*CASE, "evaluate.tta=flip"]
    summary = start(tmp_path, *lines)
    assert -1 <= summary["test_mean_rank_score"] <= 1
    assert summary["test_mean_rank_score"] != start(tmp_path / "plain", *CASE)["test_mean_rank_score"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([f"evaluate.metrics=[{OWN}missing]"], f"evaluate.metrics={OWN}missing: unknown callable"),
        (["evaluate.metrics=[tests.support.absent.kappa]"], "evaluate.metrics=tests.support.absent.kappa: unknown cal"),
        (["evaluate.metrics=[elsewhere.kappa]"], "to trust another package, set allow_packages=[elsewhere]"),
        ([f"evaluate.metrics=[{OWN}NUMBER]"], f"evaluate.metrics={OWN}NUMBER: must be a class or function defined in"),
        ([f"evaluate.metrics=[{OWN}Recorder]"], f"evaluate.metrics={OWN}Recorder: must be a function of (outputs, tar"),
        ([f"evaluate.metrics=[{OWN}one_argument]"], "one_argument: must be a function of (outputs, targets)"),
        ([f"evaluate.metrics=[{OWN}accuracy]"], f"evaluate.metrics={OWN}accuracy: dlopt has a metric accuracy"),
        ([f"evaluate.metrics=[brier_score,{OWN}brier_score]"], "brier_score: dlopt has a metric brier_score"),
        ([f"evaluate.metrics=[{OWN}spread,{OWN}spread]"], "spread: another metric is called spread, too"),
        (["evaluate.metrics=[macro_f2]"], "evaluate.metrics=macro_f2: unknown metric; did you mean m"),
        ([f"evaluate.metrics=[{OWN}spread]", "monitor=val_spread"], "monitor=val_spread: whether smaller or larger va"),
        ([f"evaluate.metrics=[{OWN}mean_rank_score]", "monitor=val_mean_rank_score"], "must be set: monitor_mode=min"),
        ([f"evaluate.metrics=[{OWN}spread]", "stopping=early", "stopping.monitor=val_spread"], "stopping.monitor=val"),
        (["monitor=val_loss", "monitor_mode=max"], "monitor_mode=max: val_loss is better when smaller"),
        (["monitor_mode=min"], "monitor_mode=min: val_accuracy is better when larger"),
        (["monitor_mode=low"], "monitor_mode=low"),
        (["schedule=plateau", "schedule.mode=max"], "schedule.mode=max: val_loss is better when smaller"),
        (["data.val_split=0", "monitor_mode=max"], "monitor_mode=max: needs a validation set"),
        (
            [
                f"evaluate.metrics=[{OWN}spread,{OWN}squared_error]",
                "monitor=val_spread",
                "stopping=early",
                "stopping.monitor=val_squared_error",
                "monitor_mode=min",
            ],
            "monitor_mode=min: cannot hold for val_spread and val_squared_error",
        ),
        (["monitor=val_spread"], "monitor=val_spread: unknown validation metric"),
        (
            [f"evaluate.metrics=[{OWN}spread]", "schedule=plateau", "schedule.monitor=val_spread"],
            "schedule.monitor=val",
        ),
        ([f"evaluate.metrics=[{OWN}spread]", "data.val_split=0"], "needs a validation set"),
    ],
)
def test_refuses(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        start(tmp_path, *SMALL, TRUST, *lines)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "must return a number, not str"),
        ("per_sample", "must return a number, not Tensor of shape [30]"),
        ("broken", "raised KeyError: 'weights'"),
    ],
)
def test_a_function_that_fails_ends_the_run_with_its_name(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(RunError, match=f"^{re.escape(f'evaluate.metrics={OWN}{name}: {message}')}$"):
        start(tmp_path, *SMALL, TRUST, f"evaluate.metrics=[{OWN}{name}]")


def test_dlopts_own_modules_are_no_metrics() -> None:
    with pytest.raises(UserError, match="cannot be used in a config"):
        user_metrics(["dlopt.basics.files.write"], ["dlopt"])
