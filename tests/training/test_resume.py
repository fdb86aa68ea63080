"""Tests that resumed runs are bitwise identical to uninterrupted ones: weights, averages, metrics."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import dlopt.training.run
from dlopt.basics import files as durable
from dlopt.basics.errors import RunError, UserError
from dlopt.data.batches import Batch, Batches
from dlopt.tracking.tracking import Tracking
from dlopt.training import loop as loop
from dlopt.training.checkpoint import checkpoints
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.checkpoint.content import Checkpoint
from dlopt.training.length import with_ends
from dlopt.training.progress import TrainingRun
from dlopt.training.step import Step
from tests.support.choices import names
from tests.support.faults import flip_bit, no_generator_restored, no_position_restored
from tests.support.lengths import constant
from tests.support.runs import (
    assert_same_run,
    at_update,
    in_fork,
    result,
    resume,
    run_config,
    run_job,
    same,
    start,
    terminate,
    timeless,
)
from tests.support.sizes import RICH, SMALL, STEPS_PER_EPOCH

LAST = 4 * STEPS_PER_EPOCH
Stopped = Callable[..., None]


def stop_at(step: int, folder: Path, *overrides: str) -> dict[str, Any]:
    with at_update(step, terminate):
        return start(folder, *overrides)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Returns a function that fills a folder with a run of RICH that was stopped after some update."""

    @cache
    def original(step: int, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("stopped")
        assert stop_at(step, folder, *RICH, *more)["status"] == "interrupted"
        return folder

    return lambda folder, step, *more: copy_run(original(step, *more), folder)


def copy_run(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def test_same_config_is_bitwise_reproducible(whole: Path, tmp_path: Path) -> None:
    start(tmp_path, *RICH)
    assert_same_run(tmp_path, whole)
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path, whole)]
    first, second = ({**end, "seconds": 0, "peak_memory": 0} for end in ends)
    assert first == second


@pytest.mark.parametrize(
    "changed", ["seed=1", "init_seed=1", "order_seed=1", "augmentation_seed=1", "data.split_seed=1"]
)
def test_every_seed_changes_the_result(whole: Path, tmp_path: Path, changed: str) -> None:
    """Otherwise the tests of equality would be meaningless."""
    start(tmp_path, *RICH, changed)
    assert not same(result(tmp_path)["model"], result(whole)["model"])


@pytest.mark.parametrize("step", [1, 6, 8, LAST])
def test_stopped_by_a_signal_and_resumed(whole: Path, tmp_path: Path, step: int) -> None:
    """Mid-epoch, at the last batch of an epoch (8), and after the last update; test_loop stops after every update."""
    summary = stop_at(step, tmp_path, *RICH)
    assert (summary["status"], summary["steps"], summary["test_loss"]) == ("interrupted", step, None)
    summary = resume(tmp_path, *RICH)
    assert (summary["status"], summary["resumed_from"]) == ("finished", [step])
    assert_same_run(tmp_path, whole)


def test_resumes_twice(whole: Path, tmp_path: Path) -> None:
    stop_at(3, tmp_path, *RICH)
    for step in (4, 9, 10):
        with at_update(step, terminate):
            assert resume(tmp_path, *RICH)["status"] == "interrupted"
    assert resume(tmp_path, *RICH)["resumed_from"] == [3, 4, 9, 10]
    assert_same_run(tmp_path, whole)


def test_stopped_during_an_evaluation(whole: Path, tmp_path: Path) -> None:
    evaluations = 0
    original = Batches.epoch

    def epoch(self: Batches, *arguments: int) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal evaluations
        for batch in original(self, *arguments):
            if self._augment is None and (evaluations := evaluations + 1) == 3:  # 2 batches in a validation
                terminate()
            yield batch

    with patch.object(Batches, "epoch", epoch):
        summary = start(tmp_path, *RICH)
    assert (summary["status"], summary["epochs"], summary["steps"]) == ("interrupted", 1, 2 * STEPS_PER_EPOCH)
    assert [line["epoch"] for line in timeless(tmp_path)] == [1]
    resume(tmp_path, *RICH)
    assert_same_run(tmp_path, whole)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("every_steps", [None, pytest.param(1, marks=pytest.mark.slow), 3])
def test_killed_at_a_random_update(whole: Path, tmp_path: Path, every_steps: int | None) -> None:
    """SIGKILL runs no handler. Twice, and from the beginning if nothing was saved."""
    overrides = [*RICH, f"checkpoint.every_steps={'null' if every_steps is None else every_steps}"]
    steps = sorted(random.Random(every_steps or 0).sample(range(1, LAST + 1), 2))

    def until(step: int) -> None:
        with at_update(step, kill):
            resume(tmp_path, *overrides)

    for step in steps:
        assert os.WTERMSIG(in_fork(lambda step=step: until(step))) == signal.SIGKILL  # type: ignore[misc]
    resume(tmp_path, *overrides)
    assert timeless(tmp_path) == timeless(whole)
    assert same(result(tmp_path)["model"], result(whole)["model"])
    for name in ("last.pt", "best.pt"):
        for key in ("optimizer", "ema", "schedule", "progress"):
            assert same(result(tmp_path, name)[key], result(whole, name)[key]), (name, key)


@contextmanager
def killed_at(owner: Any, name: str, calls: int, behind: bool = True) -> Iterator[None]:
    """Kills the process at the n-th call of a function, before or after it."""
    original, left = getattr(owner, name), calls

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and not behind:
            kill()
        value = original(*arguments, **named)
        if left == 0:
            kill()
        return value

    with patch.object(owner, name, call):
        yield


INTERRUPTIONS: dict[str, tuple[Any, str, int]] = {
    "between evaluation and metric line": (loop.Best, "update", 2),
    "between metric line and checkpoint": (Tracking, "epoch", 2),
    "inside a save": (durable, "_publish", 3),
    "after a save": (Checkpoints, "save", 2),
    "after the last save": (Checkpoints, "save", 4),
    "after the test": (dlopt.training.run, "test_report", 1),
}


@pytest.mark.parametrize("place", INTERRUPTIONS)
def test_killed_during_a_save(whole: Path, tmp_path: Path, place: str) -> None:
    def until() -> None:
        with killed_at(*INTERRUPTIONS[place]):
            start(tmp_path, *RICH)

    assert os.WTERMSIG(in_fork(until)) == signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    assert resume(tmp_path, *RICH)["status"] == "finished"
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("epochs", [1, 2])
def test_killed_between_last_and_best(tmp_path: Path, epochs: int) -> None:
    """last.pt refers to a best.pt that is not yet written; after a single epoch, there is nothing left to train."""
    overrides = [*RICH, f"epochs={epochs}"]
    start(tmp_path / "whole", *overrides)

    def until() -> None:
        with killed_at(checkpoints, "link", 1, behind=False):
            start(tmp_path / "killed", *overrides)

    assert os.WTERMSIG(in_fork(until)) == signal.SIGKILL
    left = tmp_path / "killed/checkpoints"
    assert (left / "last.pt").exists() and not (left / "best.pt").exists()
    assert resume(tmp_path / "killed", *overrides)["status"] == "finished"
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_with_data_workers(whole: Path, tmp_path: Path, workers: int) -> None:
    overrides = [*RICH, "data.memory=false", f"data.workers={workers}"]
    with at_update(6, terminate):
        assert start(tmp_path, *overrides)["status"] == "interrupted"
    assert resume(tmp_path, *overrides)["status"] == "finished"
    assert timeless(tmp_path) == timeless(whole)
    for key in ("model", "optimizer", "ema"):
        assert same(result(tmp_path)[key], result(whole)[key])


# Full-batch methods get mini-batches, too: the run is stopped within an epoch.
OPTIMIZERS = {name: [f"optimizer={name}", "data.batch_size=25", "epochs=2", "model.widths=[4]",
                     *(["ema=null"] if name.startswith("schedule_free") else [])]
              for name in names("optimizer")}  # fmt: skip
SCHEDULES = {name: [f"schedule={name}"] for name in names("schedule")}
DECAYS = ["decay.cautious=true", "optimizer.weight_decay=0.1", "epochs=3"]
TEXT = [
    "data=text", f"data.file={Path(__file__)}", "data.sequence_length=16", "data.batch_size=200", "model=gpt_nano",
    "model.width=12", "model.depth=1", "model.dropout=0.2", "tracking=[]", "threads=1", "device=cpu", "epochs=1",
]  # fmt: skip
RECIPES = {
    "full batch": ["augmentation=none", "loss=mse", "data.batch_size=full"],
    "decay linear": [*DECAYS, "optimizer=adamw", "decay=linear"],
    "decay corrected, bf16": [*DECAYS, "optimizer=muon", "decay=corrected", "precision=bf16_pure", "ema=null"],
    "decay independent": [*DECAYS, "optimizer=lion", "decay=independent", "accumulate=2"],
    "text": [*TEXT, "optimizer=adamw", "ema=0.9", "clip=norm", "model.positions=rotary"],
    "text in a file": [*TEXT, "optimizer=adamw", "data.memory=false"],
    "labels drawn by sophia": [*TEXT, "optimizer=sophia", "optimizer.hessian=gnb", "optimizer.update_every=3"],
}


@pytest.mark.parametrize(
    "extra",
    [
        *(pytest.param(extra, id=name) for name, extra in RECIPES.items()),
        *(pytest.param(extra, id=name, marks=pytest.mark.slow) for name, extra in (OPTIMIZERS | SCHEDULES).items()),
    ],
)
def test_resumes_other_recipes(tmp_path: Path, extra: list[str]) -> None:
    overrides = [*([] if extra[0] == "data=text" else RICH), *extra]
    start(tmp_path / "whole", *overrides)
    stop_at(3, tmp_path / "stopped", *overrides)
    resume(tmp_path / "stopped", *overrides)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


# -- negative controls: without any of these states the result differs


def augmentation_stream_lost() -> AbstractContextManager[Any]:
    original = Batches.epoch
    return patch.object(Batches, "epoch", lambda self, epoch, start=0, step=0: original(self, epoch, start, 0))


def dropout_stream_lost() -> AbstractContextManager[Any]:
    original = Step.begin

    def begin(self: Step, batch: Batch, number: int, **keys: Any) -> None:
        original(self, batch, number - 6, **keys)

    return patch.object(Step, "begin", begin)


def optimizer_lost() -> AbstractContextManager[Any]:
    return patch.object(torch.optim.SGD, "load_state_dict", lambda self, state: None)


def average_lost() -> AbstractContextManager[Any]:
    return patch.object(loop.WeightAverage, "restart", lambda self, updates: None)


def average_count_lost() -> AbstractContextManager[Any]:
    """Of the updates on which its warmup depends."""
    original = loop.WeightAverage.restart
    return patch.object(loop.WeightAverage, "restart", lambda self, updates: original(self))


def sums_lost() -> AbstractContextManager[Any]:
    return patch.object(loop.MetricSum, "load_state_dict", lambda self, state: None)


LOSSES = [
    no_position_restored, augmentation_stream_lost, dropout_stream_lost, optimizer_lost, average_lost,
    average_count_lost, sums_lost,
]  # fmt: skip


@pytest.mark.parametrize("lost", LOSSES, ids=lambda f: f.__name__)
def test_negative_controls(
    whole: Path, stopped: Stopped, tmp_path: Path, lost: Callable[[], AbstractContextManager[Any]]
) -> None:
    stopped(tmp_path, 6)
    with lost():
        resume(tmp_path, *RICH)
    assert timeless(tmp_path) != timeless(whole)


@contextmanager
def drawing() -> Iterator[None]:
    """A step that draws from Python's global generator, as a user's model may."""
    original = Step.forward_backward

    def forward_backward(self: Step, batch: Batch) -> Any:
        return original(self, replace(batch, inputs=batch.inputs * (1 + 0.1 * random.random())))

    with patch.object(Step, "forward_backward", forward_backward):
        yield


@pytest.mark.parametrize("restored", [True, False])
def test_restores_global_generators(tmp_path: Path, restored: bool) -> None:
    with drawing():
        start(tmp_path / "whole", *RICH)
        stop_at(6, tmp_path / "stopped", *RICH)
        with ExitStack() as stack:
            if not restored:
                stack.enter_context(no_generator_restored())
            resume(tmp_path / "stopped", *RICH)
    equal = timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")
    assert equal is restored


# -- length, time, damage


@pytest.mark.parametrize("length", ["epochs=6", "steps=24"])
def test_longer_run_is_refused_if_it_would_train_at_zero(length: str, whole: Path, tmp_path: Path) -> None:
    copy_run(whole, tmp_path)
    before = result(tmp_path), timeless(tmp_path), (tmp_path / "train.log").read_text()
    with pytest.raises(UserError) as error:
        resume(tmp_path, *RICH, length)
    assert str(error.value).startswith(f"{length}: the schedule of this run ends at epoch 4 with learning rate 0")
    assert "set schedule_epochs=6 to stretch the schedule, or schedule_epochs=4 to train on at 0" in str(error.value)
    after = result(tmp_path), timeless(tmp_path), (tmp_path / "train.log").read_text()
    assert same(before[0], after[0]) and before[1:] == after[1:]


def test_interrupted_run_is_refused_if_it_would_end_at_zero(stopped: Stopped, tmp_path: Path) -> None:
    stopped(tmp_path, 6)
    with pytest.raises(UserError, match="epochs=6: the schedule of this run ends at epoch 4"):
        resume(tmp_path, *RICH, "epochs=6")


@pytest.mark.parametrize(
    ("schedule", "length", "line"),
    [
        ("schedule.final=0.1", "epochs=6", "ends at epoch 4; later epochs have 0.1 of the peak learning rate"),
        ("schedule=multistep", "epochs=6", "ends at epoch 4; later epochs have 0.01 of the peak learning rate"),
        ("schedule.final=0.1", "steps=8", "steps=8: the schedule ends at epoch 4, the run at epoch 2 with 0."),
        ("schedule=constant", "epochs=6", None),
        ("schedule=constant", "epochs=3", None),
        ("schedule=plateau", "epochs=6", None),
        ("schedule.final=0.1", "epochs=4", None),
    ],
)
def test_log_names_the_end_of_the_schedule_for_another_length(
    schedule: str, length: str, line: str | None, stopped: Stopped, tmp_path: Path
) -> None:
    stopped(tmp_path, 6, schedule)
    resume(tmp_path, *RICH, schedule, length)
    notes = [each for each in (tmp_path / "train.log").read_text().splitlines() if "the schedule ends" in each]
    assert len(notes) == (0 if line is None else 1)
    assert line is None or (line in notes[0] and "set schedule_epochs=" in notes[0])


def test_refuses_a_length_that_is_done(stopped: Stopped, tmp_path: Path) -> None:
    stopped(tmp_path, 6)
    for length, done in (("epochs=1", "1.5 epochs"), ("steps=5", "6")):
        with pytest.raises(UserError, match=rf"^{length}: this run has already done {done}; set a larger number"):
            resume(tmp_path, *RICH, length)


@pytest.mark.parametrize(("epoch", "position", "epochs"), [(1, 2, 3), (2, 0, 4)])
def test_counts_an_epoch_that_steps_ended_early(epoch: int, position: int, epochs: int) -> None:
    """The console showed epoch 4/3 of a run of 6 updates that was resumed with 12."""
    settings = run_config(*SMALL, "steps=12").settings
    of_data = constant(6, STEPS_PER_EPOCH, 12)
    progress = {"epoch": epoch, "position": position, "step": 6, "length": of_data.state_dict()}
    assert with_ends(of_data, settings, None).epochs == 3
    assert with_ends(of_data, settings, Checkpoint({"progress": progress})).epochs == epochs


def test_longer_run_keeps_its_schedule(whole: Path, tmp_path: Path) -> None:
    """Two more epochs with a schedule over the first four, which stays at its final value (zero)."""
    copy_run(whole, tmp_path)
    summary = resume(tmp_path, *RICH, "epochs=6", "schedule_epochs=4")
    assert summary["epochs"] == 6
    rates = [line["lr"] for line in timeless(tmp_path)]
    other = tmp_path / "other"
    start(other, *RICH, "epochs=6", "schedule_epochs=4")
    assert rates == [line["lr"] for line in timeless(other)]
    assert timeless(tmp_path) == timeless(other)
    assert rates[4:] == [0.0, 0.0]


def test_longer_run_with_schedule_epochs_has_a_new_schedule(whole: Path, tmp_path: Path) -> None:
    copy_run(whole, tmp_path)
    resume(tmp_path, *RICH, "epochs=6", "schedule_epochs=6")
    assert timeless(tmp_path)[4]["lr"] > 0


def test_max_time_stops_with_a_checkpoint(whole: Path, tmp_path: Path) -> None:
    summary = start(tmp_path, *RICH, "max_time=0.00001")
    assert (summary["status"], summary["steps"]) == ("interrupted", 1)
    resume(tmp_path, *RICH, "max_time=0.00001")
    assert resume(tmp_path, *RICH)["resumed_from"] == [1, 2]
    assert_same_run(tmp_path, whole)


def test_second_sigint_exits_at_once(whole: Path, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with at_update(7, twice), pytest.raises(KeyboardInterrupt):
        start(tmp_path, *RICH)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if ".tmp" in path.name]
    assert resume(tmp_path, *RICH)["resumed_from"] == [4]
    assert_same_run(tmp_path, whole)


def test_damaged_last_checkpoint_does_not_change_the_result(whole: Path, stopped: Stopped, tmp_path: Path) -> None:
    stopped(tmp_path, 10)
    flip_bit(tmp_path / "checkpoints/last.pt", random.Random(0))
    assert resume(tmp_path, *RICH)["resumed_from"] == [8]
    assert_same_run(tmp_path, whole)


def test_killed_before_the_first_save_after_resuming_in_a_new_folder(tmp_path: Path) -> None:
    overrides = [*RICH, "checkpoint.keep=4", "ema=null"]
    start(tmp_path / "whole", *overrides)
    ends, end = timeless(tmp_path / "whole"), result(tmp_path / "whole")
    state = checkpoints.load(tmp_path / "whole/checkpoints/step-4.pt")

    def until() -> None:
        with at_update(6, kill):
            run_job(TrainingRun(run_config(*overrides), tmp_path / "new", state))

    assert os.WTERMSIG(in_fork(until)) == signal.SIGKILL
    assert set(resume(tmp_path / "new", *overrides)["resumed_from"]) == {4}
    assert same(result(tmp_path / "new"), end)
    assert timeless(tmp_path / "new") == ends[1:]


def test_never_restarts_if_all_checkpoints_are_damaged(stopped: Stopped, tmp_path: Path) -> None:
    stopped(tmp_path, 10)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        flip_bit(path, random.Random(0))
    with pytest.raises(RunError, match=r"all checkpoints in .* are damaged"):
        resume(tmp_path, *RICH)


def test_removes_an_incomplete_metrics_line(whole: Path, stopped: Stopped, tmp_path: Path) -> None:
    stopped(tmp_path, 10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')
    resume(tmp_path, *RICH)
    assert_same_run(tmp_path, whole)
