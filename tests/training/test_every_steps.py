"""Tests of evaluations within an epoch, and of evaluations on a subset of the validation set."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.batches import Batches
from dlopt.data.samples import InMemory
from dlopt.data.splits import evaluation_subset
from dlopt.tracking import terminal_text
from dlopt.training.builders.workload import build_workload
from dlopt.training.checkpoint.checkpoints import load
from tests.support.runs import (
    assert_same_run,
    at_update,
    in_fork,
    metrics,
    result,
    resume,
    run_config,
    same,
    start,
    terminate,
    timeless,
)
from tests.support.sizes import RICH, RUN, SMALL, STEPS_PER_EPOCH, without

EVERY = "evaluate.every_steps=2"  # of 4 updates in an epoch: one evaluation within it, and one at its end
CASE = [*without(RICH, "epochs="), "epochs=2", EVERY]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every_steps")
    start(folder, *CASE)
    return folder


def test_lines_within_an_epoch_have_fractions_of_it(whole: Path) -> None:
    lines = metrics(whole)
    assert [(line["step"], line["epoch"]) for line in lines] == [(2, 0.5), (4, 1), (6, 1.5), (8, 2)]
    assert [type(line["epoch"]) for line in lines] == [float, int, float, int]


@pytest.mark.parametrize("changed", [[], ["sampler=hard_examples", "norm_statistics=exact"]], ids=["plain", "sampler"])
def test_evaluations_within_an_epoch_do_not_change_the_training(changed: list[str], tmp_path: Path) -> None:
    """With a sampler that is updated by losses, which an evaluation adds up early, too."""
    start(tmp_path / "within", *CASE, *changed)
    start(tmp_path / "ends", *CASE, *changed, "evaluate.every_steps=null")
    ends = [line for line in timeless(tmp_path / "within") if line["step"] % STEPS_PER_EPOCH == 0]
    assert ends == timeless(tmp_path / "ends")
    assert same(result(tmp_path / "within")["model"], result(tmp_path / "ends")["model"])


@pytest.mark.parametrize("step", [2, 6])
def test_an_evaluation_within_an_epoch_equals_that_of_a_run_of_this_length(
    whole: Path, tmp_path: Path, step: int
) -> None:
    start(tmp_path, *without(CASE, "evaluate."), f"steps={step}", "schedule_epochs=2")
    [line] = [line for line in timeless(whole) if line["step"] == step]
    assert {**line, "epoch": 0} == {**timeless(tmp_path)[-1], "epoch": 0}


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6, 7])
def test_resumed_within_an_epoch(whole: Path, tmp_path: Path, step: int) -> None:
    """Also stopped right before an evaluation, within an epoch (2, 6) and at its end (4)."""
    with at_update(step, terminate):
        assert start(tmp_path, *CASE)["status"] == "interrupted"
    assert resume(tmp_path, *CASE)["resumed_from"] == [step]
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("batch", "steps"), [(1, 2), (2, 2), (3, 4), (5, 6)])
def test_stopped_during_an_evaluation(whole: Path, tmp_path: Path, batch: int, steps: int) -> None:
    """A validation has two batches."""
    evaluated = 0
    original = Batches.epoch

    def epoch(self: Batches, *arguments: int) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal evaluated
        for each in original(self, *arguments):
            if self._augment is None and (evaluated := evaluated + 1) == batch:
                terminate()
            yield each

    with patch.object(Batches, "epoch", epoch):
        summary = start(tmp_path, *CASE)
    assert (summary["status"], summary["steps"]) == ("interrupted", steps)
    assert (tmp_path / "metrics.jsonl").exists() == (steps > 2)
    assert steps == 2 or [line["step"] for line in metrics(tmp_path)] == list(range(2, steps, 2))
    resume(tmp_path, *CASE)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("step", [3, 7])
def test_killed_within_an_epoch(whole: Path, tmp_path: Path, step: int) -> None:
    """Lines after the checkpoint are removed: it is of the latest update, or of the best evaluation."""
    lines = [*CASE, "checkpoint.every_steps=3"]

    def until() -> None:
        with at_update(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            start(tmp_path, *lines)

    assert os.WTERMSIG(in_fork(until)) == signal.SIGKILL
    resume(tmp_path, *lines)
    assert timeless(tmp_path) == timeless(whole)
    assert same(result(tmp_path)["model"], result(whole)["model"])


def test_the_best_model_may_be_one_within_an_epoch(tmp_path: Path) -> None:
    """Learning rates that ruin the model after update 2: the best model is that of epoch 0.5, also after a resume."""
    lines = [*RUN, "epochs=1", EVERY, "monitor=val_loss"]

    def ruin(folder: Path, run: Any) -> dict[str, Any]:
        from dlopt.training.step import Step

        original = Step.update

        def update(self: Step, batch: Any, number: int, **keys: Any) -> Any:
            record = original(self, batch, number, **keys)
            if number == 2:
                with torch.no_grad():
                    for parameter in self.parameters:
                        parameter.mul_(-9)
            return record

        with patch.object(Step, "update", update):
            summary: dict[str, Any] = run(folder, *lines)
            return summary

    summary = ruin(tmp_path / "whole", start)
    first, last = metrics(tmp_path / "whole")
    assert first["val_loss"] < last["val_loss"]
    assert (summary["best_epoch"], summary["best_val_loss"]) == (0.5, first["val_loss"])
    best = load(tmp_path / "whole/checkpoints/best.pt")
    assert (best.step, best.epoch) == (2, 0)
    start(tmp_path / "short", *without(lines, "evaluate.", "epochs="), "steps=2")
    assert same(best.model, result(tmp_path / "short")["model"])
    with at_update(3, terminate):
        ruin(tmp_path / "resumed", start)
    resumed = ruin(tmp_path / "resumed", resume)
    assert resumed["test_loss"] == summary["test_loss"]
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_early_stopping_within_an_epoch(tmp_path: Path) -> None:
    """The evaluation that stops a run ends its epoch, as that of any other run that stops within one."""
    lines = [*RUN, EVERY, "stopping=early", "stopping.patience=2", "stopping.min_delta=9"]
    summary = start(tmp_path, *lines)
    assert (summary["status"], summary["steps"], summary["epochs"]) == ("stopped_early", 6, 2)
    assert [line["epoch"] for line in metrics(tmp_path)] == [0.5, 1, 2]
    before = result(tmp_path)
    assert resume(tmp_path, *lines)["status"] == "stopped_early"
    assert same(result(tmp_path), before)


def test_a_target_that_is_reached_within_an_epoch_keeps_its_model(tmp_path: Path) -> None:
    lines = [*RUN, EVERY, "stopping=target", "stopping.monitor=val_loss", "stopping.value=1e9"]
    summary = start(tmp_path, *lines)
    assert (summary["status"], summary["steps"], summary["best_epoch"]) == ("stopped_early", 2, 1)
    assert load(tmp_path / "checkpoints/best.pt").step == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["evaluate.every_steps=4"], r"evaluate\.every_steps=4: the epoch has only 4 updates, and is evaluated at its"),
        (["steps=2"], r"evaluate\.every_steps=2: the run has only 2 updates, and is evaluated at its end"),
        (["evaluate.samples=31"], r"evaluate\.samples=31: the validation set has only 30 samples"),
        (["evaluate.samples=9"], r"evaluate\.samples=9: 9 samples cannot include one of each of the 10 classes"),
        (["evaluate.samples=9", "data.val_split=0"], r"evaluate\.samples=9: needs a validation set; set data\.val_spl"),
    ],
)
def test_refuses_what_cannot_work(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(tmp_path, *SMALL, EVERY, *lines)


def test_validates_on_a_fixed_subset_with_the_class_proportions(tmp_path: Path) -> None:
    """The loss of the subset is recomputed from the model and the samples; the test set stays whole."""
    lines = [*SMALL, "epochs=1", "evaluate.samples=20", "norm_statistics=running"]
    summary = start(tmp_path / "some", *lines)
    workload = build_workload(run_config(*lines))
    val = workload.dataset.val
    assert val is not None and len(val) == 30
    subset = evaluation_subset(val, 20, workload.run_config.data_settings.split_seed)
    assert len(subset) == 20
    all_counts, counts = (torch.bincount(each.targets, minlength=10) for each in (val, subset))
    assert (counts >= 1).all() and (counts - all_counts * 20 / 30).abs().max() < 1.5
    workload.load(load(tmp_path / "some/checkpoints/last.pt"))
    workload.module.eval()
    with torch.inference_mode():
        outputs = workload.module(workload.normalize(subset.fetch(torch.arange(20))).float())
        expected = torch.nn.functional.cross_entropy(outputs, subset.targets).item()
    assert metrics(tmp_path / "some")[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)
    other = start(tmp_path / "all", *lines, "evaluate.samples=null")
    assert (summary["test_loss"], summary["test_accuracy"]) == (other["test_loss"], other["test_accuracy"])
    assert metrics(tmp_path / "all")[-1]["val_loss"] != metrics(tmp_path / "some")[-1]["val_loss"]


def test_the_subset_is_a_function_of_the_seed() -> None:
    samples = InMemory(torch.arange(100.0).unsqueeze(1), torch.arange(100) % 3)
    drawn = [evaluation_subset(samples, 31, seed).fetch(torch.arange(31)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], drawn[0].sort(0).values)  # in the order of the validation set
    assert evaluation_subset(samples, None, 0) is samples
    assert torch.equal(evaluation_subset(samples, 100, 0).fetch(torch.arange(100)), samples.inputs)


def test_the_header_names_the_subset() -> None:
    rows = terminal_text.header_rows({}, {}, {"train": 4_000, "val": 144, "test": 10_000, "all_val": 1_000})
    assert rows["data"] == ["4,000 train, 144 of 1,000 val, 10,000 test"]
    assert terminal_text.header_rows({}, {}, {"train": 4_000, "val": 144})["data"] == ["4,000 train, 144 val"]
