"""Tasks of the user's own: draws, parts, evaluations, refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.basics.errors import RunError, UserError
from dlopt.config.schema import Component
from dlopt.parallel.batch_shards import BatchSplit
from dlopt.tasks.draws import Draws
from dlopt.training.batch_norm import check_norm_batches
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload
from tests.support.equality import compare
from tests.support.line import dlopt, refused
from tests.support.runs import assert_same_run, at_update, metrics, resume, run_config, start, terminate, timeless
from tests.support.user_parts import UnitNet

PACKAGE = "tests.support.own_tasks"
MODEL = ["model=mlp", "model.widths=[8]", "model.norm=none", "optimizer=adamw", "data.subset=60", "data.batch_size=16"]
FP64 = ["precision=fp64", "threads=1"]


def task(name: str = "Noisy") -> list[str]:
    return [f"task={PACKAGE}.{name}", "allow_packages=[tests]", *MODEL, "tracking=[]", "epochs=3"]


def test_draws_of_a_part_are_rows_of_those_of_the_batch() -> None:
    whole = Draws.of_update(torch.device("cpu"), 3, 10, torch.float64)
    drawn = [whole.normal(2), whole.uniform(), whole.integers(7, 3)]
    for positions in (slice(0, 4), slice(4, 9), slice(9, 10)):
        part = whole.at(positions)
        assert len(part) == positions.stop - positions.start
        for found, expected in zip([part.normal(2), part.uniform(), part.integers(7, 3)], drawn, strict=True):
            assert torch.equal(found, expected[positions])
    assert drawn[0].dtype == torch.float64 and float(drawn[1].min()) >= 0 and int(drawn[2].max()) < 7


@pytest.mark.parametrize("changed", [["accumulate=4"], ["accumulate=5", "data.batch_size=17"]], ids=" ".join)
def test_losses_do_not_depend_on_the_micro_batches(tmp_path: Path, changed: list[str]) -> None:
    lines = [*task(), *FP64, *changed]
    start(tmp_path / "whole", *(each for each in lines if "accumulate" not in each))
    start(tmp_path / "parts", *lines)
    for one, other in zip(timeless(tmp_path / "whole"), timeless(tmp_path / "parts"), strict=True):
        assert one.keys() == other.keys() and {"train_fit", "train_shift", "val_spread"} <= one.keys()
        for key in one:
            assert other[key] == pytest.approx(one[key], rel=1e-9), key


def test_the_validation_loss_does_not_depend_on_the_size_of_its_batches(tmp_path: Path) -> None:
    """A sample has the draws of its place in the whole set: of 30 samples in batches of 16, or in one."""
    losses = []
    for size in (16, 40):
        lines = [*task(), *FP64, "data.val_split=0.5", "optimizer.lr=1e-12", "epochs=1", f"data.batch_size={size}"]
        start(tmp_path / str(size), *lines)
        losses.append(metrics(tmp_path / str(size))[0]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def _gradients(trainer: Any, split: BatchSplit) -> list[torch.Tensor]:
    """Returns the gradients of the batches of an epoch on one rank, summed as an all-reduce does."""
    trainer.mode.split = split
    trainer.batches._shard = split.shard
    sums = [torch.zeros_like(p) for p in trainer.step.parameters]
    for number, batch in enumerate(trainer.batches.epoch(0)):
        trainer.step.zero_grad()
        trainer.step.begin(batch, number, log_norm=False)
        _, kept = trainer.step.forward_backward(batch)
        assert all(bool(each.loss.isfinite()) for each in kept)
        for total, p in zip(sums, trainer.step.parameters, strict=True):
            total += p.grad
    return sums


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["Direction", None])
def test_a_rank_without_samples_adds_nothing(name: str | None, accumulate: int) -> None:
    """Of 50 samples in batches of 16, the last 2 leave three of four ranks none: not NaN, but a gradient of zero.

    Also of a model that divides by the norm of its input, and reads no empty batch.
    """
    lines = [*MODEL, *FP64, "tracking=[]", f"accumulate={accumulate}"]
    config = run_config(*task(name), *lines) if name else run_config(*lines)
    config = config if name else replace(config, model=Component("model", UnitNet, {}))
    trainer: Any = probe_trainer(build_workload(config), Path())
    alone = _gradients(trainer, BatchSplit(accumulate))
    ranks = [_gradients(trainer, BatchSplit(accumulate, rank, 4)) for rank in range(4)]
    for expected, *parts in zip(alone, *ranks, strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), expected, rtol=1e-9, atol=1e-12)


def test_batch_norm_does_not_count_the_sample_that_stands_in() -> None:
    workload = build_workload(run_config(*task("Direction"), "model.norm=batch"))
    workload.parallel.split = BatchSplit(1, 0, 4)
    message = r"^data.batch_size=16: .*batch norm fails on an empty shard; use larger batches, data.drop_last=true, or"
    with pytest.raises(UserError, match=message):
        check_norm_batches(workload, training_batches(workload))


@pytest.mark.slow
def test_losses_do_not_depend_on_the_processes(tmp_path: Path) -> None:
    """Also with a last batch that leaves a process without samples, in ddp and fsdp."""
    lines = [*task(), *FP64, "data.batch_size=17"]
    cases = {mode: ([*lines], [f"parallel={mode}", "accumulate=2"]) for mode in ("ddp", "fsdp")}
    compare(tmp_path, 3, cases)


def test_every_evaluation_of_an_update_sees_the_same_draws() -> None:
    trainer = probe_trainer(build_workload(run_config(*task(), *FP64, "optimizer=lbfgs", "accumulate=2")), Path())
    step: Any = trainer.step
    batches = list(trainer.batches.epoch(0))[:2]
    losses = []
    for number, batch in enumerate(batches):
        step.begin(batches[0], number, log_norm=False)
        losses.append(float(step()))
        assert float(step()) == losses[-1] == float(step.loss().detach())
        del batch
    assert losses[0] != losses[1], "the next update draws others"


def test_the_parts_add_up_to_the_loss(tmp_path: Path) -> None:
    summary = start(tmp_path, *task())
    for line in metrics(tmp_path):
        assert line["train_fit"] + line["train_shift"] == pytest.approx(line["train_loss"], rel=1e-6)
    assert summary["test_accuracy"] == 1 and math.isfinite(summary["test_spread"])


def test_resumes_within_an_epoch_bitwise(tmp_path: Path) -> None:
    start(tmp_path / "whole", *task(), "augmentation=affine")
    with at_update(6, terminate):
        start(tmp_path / "stopped", *task(), "augmentation=affine")
    resume(tmp_path / "stopped", *task(), "augmentation=affine")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_monitors_a_value_in_its_direction(tmp_path: Path) -> None:
    summary = start(tmp_path, *task(), "monitor=val_spread")
    lines = metrics(tmp_path)
    best = min(lines, key=lambda line: line["val_spread"])
    assert (summary["best_epoch"], summary["best_val_spread"]) == (best["epoch"], best["val_spread"])


def test_a_report_knows_the_directions(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "train", "-m", *task(), "seed=0,1", "hydra.sweep.dir=sweep")
    assert result.code == 0, result.err
    ranked = dlopt(tmp_path, "report", "sweep", "by=val_spread")
    assert ranked.code == 0 and "val spread" in ranked.out.splitlines()[0], ranked


def test_views_are_augmented_independently(tmp_path: Path) -> None:
    start(tmp_path, *task("Views"), "augmentation=affine")
    last = metrics(tmp_path)[-1]
    assert last["train_difference"] > 0.01
    assert last["val_spread"] == 0, "evaluations do not augment"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Raises", "the loss raised KeyError: 'missing'"),
        ("Vector", r"its loss is a tensor of shape \[16, 1\]; must be a number"),
        ("Detached", "its loss has no gradient; do not detach it"),
        ("Integer", "its loss, part fit, has the type int64; must be floating-point"),
        ("ChangesParts", "its loss returned the parts part1, and part0 before"),
        ("NamesLoss", "its loss: 'loss' cannot name a part"),
        ("ReturnsText", "evaluate: spread must be a number, not str"),
        ("ForgetsValue", "evaluate returned spread; must return spread, accuracy"),
    ],
)
def test_wrong_code_ends_the_run_with_the_name_of_the_task(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(RunError, match=rf"^task={PACKAGE}\.{name}: {message}"):
        start(tmp_path, *task(name))


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=rf"loss became inf at update 1 .*first: the loss of task={PACKAGE}.Infinite itself"
    ):
        start(tmp_path, *task("Infinite"))


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("WrongDirection", [], "values: the direction of dlopt's metric accuracy is not min"),
        ("ValueLoss", [], "values: 'loss' cannot name a value"),
        ("Noisy", ["monitor=val_width"], "monitor=val_width: unknown validation metric"),
    ],
)
def test_refuses(name: str, typed: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_workload(run_config(*task(name), *typed))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("evaluate.tta=flip", "evaluate.tta=flip: averages"),
        ("init=lsuv", "init=lsuv: measures the inputs of the model"),
        ("optimizer.hessian=gnb", "has no class probabilities, of which Sophia draws labels"),
    ],
)
def test_refuses_what_needs_outputs(tmp_path: Path, typed: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(tmp_path, *task(), "optimizer=sophia", typed)


def test_refuses_a_typed_loss_and_a_class_that_is_no_task(tmp_path: Path) -> None:
    (tmp_path / "no_task.py").write_text("class Mine:\n    pass\n")
    typed = "allow_packages=[no_task]"
    message = refused(tmp_path, "train", "task=no_task.Mine", "loss=mse", typed)
    assert "loss: task=no_task.Mine computes its own loss" in message
    message = refused(tmp_path, "train", "task=no_task.Mine", typed)
    assert "task=no_task.Mine: must be a class derived from dlopt.extend.UserTask" in message


def test_predictions_are_refused(tmp_path: Path) -> None:
    start(tmp_path / "run", *task())
    result = dlopt(tmp_path, "export", "checkpoint=run", "format=safetensors", "output=x", "allow_packages=[tests]")
    assert result.code == 2 and "does not say how to predict" in result.err
    tested = dlopt(tmp_path, "eval", "checkpoint=run", "allow_packages=[tests]")
    assert tested.code == 0, tested.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert f"{summary['test_spread']:.4f}" in tested.out


def test_a_run_inherits_the_task_of_another(tmp_path: Path) -> None:
    line = [*task(), "monitor=val_spread"]
    assert dlopt(tmp_path, "train", *line, "output=first").code == 0
    result = dlopt(tmp_path, "train", "from=first", "allow_packages=[tests]", "tracking=[]", "output=second")
    assert result.code == 0, result.err
    assert timeless(tmp_path / "first") == timeless(tmp_path / "second")


RECORDS = ["data=custom", f"data.train._target_={PACKAGE}.Items", "data.subset=null", "normalize=none"]


def test_batches_of_records(tmp_path: Path) -> None:
    """Dicts and tuples, in memory and from workers, in micro-batches: the same losses, and exact integers."""
    lines = [*task("Records"), *RECORDS, *FP64]
    cases = {
        "dict": lines,
        "tuple": [*lines, "+data.train.keys=tuple"],
        "workers": [*lines, "data.memory=false", "data.workers=1"],
        "parts": [*lines, "accumulate=3"],
    }
    found = {}
    for name, case in cases.items():
        start(tmp_path / name, *case)
        found[name] = timeless(tmp_path / name)
    assert found["dict"] == found["tuple"] == found["workers"]
    for one, other in zip(found["dict"], found["parts"], strict=True):
        assert other == pytest.approx(one, rel=1e-9)
    assert all(0 < line["val_odd_fraction"] < 1 for line in found["dict"])


@pytest.mark.slow
def test_records_on_several_processes(tmp_path: Path) -> None:
    lines = [*task("Records"), *RECORDS, *FP64, f"data.test._target_={PACKAGE}.Items", "data.batch_size=17"]
    compare(tmp_path, 3, {mode: (lines, [f"parallel={mode}"]) for mode in ("ddp", "fsdp")})


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["task=auto"], "a task of your own reads them: task=mine.Task"),
        (["normalize=standardize"], "normalize=standardize: data=custom: its items are no pairs (input, label), but"),
        (["augmentation=affine"], "augmentation: requires images"),
        (["+data.train.keys=ragged"], "[5]: has point float64 [2], sum"),
        (["+data.train.keys=texts"], "[0]: name is of type str; must be a tensor"),
        ([f"data.val._target_={PACKAGE}.Items", "+data.val.keys=tuple"], "data.val: its items have 0 float64 [3],"),
        (
            [f"data.val._target_={PACKAGE}.Items", "+data.val.size=0"],
            "data.val (tests.support.own_tasks.Items): is empty",
        ),
        (
            [f"data.val._target_={PACKAGE}.Items", "+data.val.keys=numbers"],
            "[0]: is of type int; expected a dict or a tuple",
        ),
        ([f"data.val._target_={PACKAGE}.Items", "+data.val.keys=raises"], "[0]: KeyError: 'lost'"),
        (["task=tests.support.own_tasks.Noisy"], "model_arguments must return input_shape, the shape of what"),
    ],
)
def test_refuses_records(typed: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_workload(run_config(*task("Records"), *RECORDS, *typed))
    assert message in str(error.value)
