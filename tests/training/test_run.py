"""Tests of a run: results against a hand-written loop, files, exit codes, signals."""

import copy
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.basics.errors import UserError
from dlopt.basics.interruption import Interruption
from dlopt.data.batches import Batches
from dlopt.parallel.ranks import Ranks
from dlopt.run import runner
from dlopt.tasks.report import TestReport
from dlopt.training import evaluate
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.workload import Workload, build_workload
from dlopt.training.checkpoint.checkpoints import Checkpoints, load
from dlopt.training.checkpoint.content import KEYS
from dlopt.training.loop import Trainer
from dlopt.training.progress import TrainingRun
from dlopt.training.run import Tools, train_run
from tests.support.runs import (
    at_update,
    execute,
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
from tests.support.sizes import RICH, RUN, SMALL

PLAIN = [*SMALL, "model.norm=none", "schedule=constant", "precision=fp64", "epochs=3"]


def means(module: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Loss and accuracy, sample by sample."""
    module = copy.deepcopy(module).double().eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for x, y in zip(inputs.double(), targets, strict=True):
            outputs = module(x[None])
            loss += F.cross_entropy(outputs, y[None]).item()
            right += int(outputs.argmax()) == int(y)
    return loss / len(targets), right / len(targets)


def evaluated(workload: Workload, samples: Any) -> tuple[Tensor, Tensor]:
    return workload.normalize(samples.fetch(torch.arange(len(samples)))), samples.targets


# -- results


def test_short_run_with_ema_is_as_good_as_without(tmp_path: Path) -> None:
    """Without the warmup, the average is nearly the random initial weights after 48 updates."""
    lines = [*SMALL, "data.subset=300", "epochs=5"]
    plain, averaged, constant = (
        start(tmp_path / name, *lines, *keys)["best_val_loss"]
        for name, *keys in [("plain",), ("averaged", "ema=0.999"), ("constant", "ema=0.999", "ema_warmup=false")]
    )
    assert averaged < 1.02 * plain < 0.6 * constant


def test_counts_the_evaluations_of_optimizers_with_several_per_update(tmp_path: Path) -> None:
    start(tmp_path / "sam", *SMALL, "optimizer=sam", "epochs=2")
    assert [line["evaluations"] for line in metrics(tmp_path / "sam")] == [8, 16]  # two per update
    start(tmp_path / "sgd", *SMALL, "epochs=1")
    assert "evaluations" not in metrics(tmp_path / "sgd")[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equals_a_hand_written_loop_in_fp64(tmp_path: Path, optimizer: str) -> None:
    """Losses and weights, bitwise."""
    overrides = [*PLAIN, f"optimizer={optimizer}", "optimizer.lr=0.05", "data.subset=100"]
    start(tmp_path, *overrides)

    workload = build_workload(run_config(*overrides))
    batches, model = training_batches(workload), workload.module
    inputs, targets = evaluated(workload, workload.dataset.train)
    made: torch.optim.Optimizer
    if optimizer == "sgd":
        made = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    else:
        made = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.01, fused=True)
    for epoch, line in enumerate(metrics(tmp_path)):
        order = batches.sampler.order(epoch)
        assert sorted(order.tolist()) == list(range(75)), "every sample once"
        total, right = 0.0, 0
        for part in order.split(25):
            made.zero_grad()
            outputs = model(inputs[part].double())
            loss = F.cross_entropy(outputs, targets[part])
            loss.backward()
            made.step()
            total += loss.item() * len(part)
            right += int((outputs.argmax(1) == targets[part]).sum())
        assert line["train_loss"] == total / 75
        assert line["train_accuracy"] == right / 75
    weights = result(tmp_path)["model"]
    assert same(weights, dict(model.state_dict()))
    assert all(value.dtype == torch.float64 for value in weights.values())


def test_modes_of_the_caller_do_not_change_the_result(tmp_path: Path) -> None:
    """A notebook may have disabled gradients, or changed the default dtype."""
    start(tmp_path / "plain", *RICH, "epochs=1")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            start(tmp_path / "changed", *RICH, "epochs=1")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(result(tmp_path / "plain"), result(tmp_path / "changed"))


def test_metrics_equal_those_of_the_saved_models(tmp_path: Path) -> None:
    """Sample by sample: validation of the last model, test of the best one, both of the EMA."""
    summary = start(tmp_path, *RICH, "optimizer.lr=0.3")
    workload = build_workload(run_config(*RICH))
    last, best = load(tmp_path / "checkpoints/last.pt"), load(tmp_path / "checkpoints/best.pt")
    assert workload.dataset.val is not None and workload.dataset.test is not None
    assert (len(workload.dataset.train), len(workload.dataset.val)) == (90, 30), "30 is no multiple of 25"

    workload.module.load_state_dict(last.evaluated_weights)
    loss, accuracy = means(workload.module, *evaluated(workload, workload.dataset.val))
    line = metrics(tmp_path)[-1]
    assert line["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert line["val_accuracy"] == accuracy

    workload.module.load_state_dict(best.evaluated_weights)
    loss, accuracy = means(workload.module, *evaluated(workload, workload.dataset.test))
    assert summary["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert summary["test_accuracy"] == accuracy
    chosen = metrics(tmp_path)[summary["best_epoch"] - 1]
    assert chosen["val_accuracy"] == max(line["val_accuracy"] for line in metrics(tmp_path))
    for key in ("val_loss", "val_accuracy"):
        assert summary[f"best_{key}"] == chosen[key]
    assert best.epoch == summary["best_epoch"]


def test_tests_the_best_model(tmp_path: Path) -> None:
    """With a learning rate for which the last epoch is not the best."""
    overrides = [*SMALL, "model.norm=none", "epochs=4", "schedule=constant", "optimizer.lr=1", "seed=2"]
    summary = start(tmp_path, *overrides)
    assert summary["best_epoch"] < 4
    workload = build_workload(run_config(*overrides))
    assert workload.dataset.test is not None
    tested = []
    for name in ("best.pt", "last.pt"):
        workload.module.load_state_dict(load(tmp_path / "checkpoints" / name).model)
        tested.append(build_test(workload))
    assert summary["test_accuracy"] == tested[0] != tested[1]


def build_test(workload: Workload) -> float:
    assert workload.dataset.test is not None
    return means(workload.module, *evaluated(workload, workload.dataset.test))[1]


def test_bf16_metrics_are_close_to_fp32(tmp_path: Path) -> None:
    overrides = [*SMALL, "epochs=2", "schedule=constant", "optimizer.lr=0.01"]
    for precision in ("fp32", "bf16"):
        start(tmp_path / precision, *overrides, f"precision={precision}")
    for full, low in zip(metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16"), strict=True):
        assert full["val_loss"] != low["val_loss"]
        assert low["val_loss"] == pytest.approx(full["val_loss"], rel=0.05)
    assert all(v.dtype == torch.float32 for k, v in result(tmp_path / "bf16")["model"].items() if "num" not in k)


@pytest.mark.parametrize(
    "extra",
    [
        ["data.val_split=0"],
        ["data.subset=30", "data.batch_size=full"],
        ["data.batch_size=1", "data.subset=20", "epochs=1", "model.norm=none"],
        ["accumulate=5"],
        ["evaluate.every_epochs=4", "epochs=5"],
        ["steps=3"],
        ["data.drop_last=true"],
    ],
    ids=" ".join,
)
def test_unusual_sizes(tmp_path: Path, extra: list[str]) -> None:
    summary = start(tmp_path, *SMALL, "model.norm=none", "epochs=2", *extra)
    assert summary["status"] == "finished"
    assert math.isfinite(summary["test_loss"]) and 0 <= summary["test_accuracy"] <= 1
    assert len(metrics(tmp_path)) >= 1
    assert (summary["best_epoch"] is None) == (extra == ["data.val_split=0"])


def test_init_from(tmp_path: Path) -> None:
    """Starts at epoch 0 with a new optimizer, from the EMA of the other run."""
    start(tmp_path / "first", *RICH)
    best = tmp_path / "first/checkpoints/best.pt"
    summary = start(tmp_path / "second", *RICH, f"init_from={best}", "optimizer.lr=1e-30", "epochs=1")
    assert (summary["resumed_from"], summary["steps"]) == ([], 4)
    given, taken = load(best).state["ema"], load(tmp_path / "second/checkpoints/last.pt").model
    weights = [name for name in given if "running" not in name and "num_batches" not in name]
    assert weights and all(torch.equal(given[name], taken[name]) for name in weights)
    averaged = load(tmp_path / "second/checkpoints/last.pt").state["ema"]
    for name in weights:
        torch.testing.assert_close(averaged[name], given[name], msg=f"the EMA of {name} starts at the loaded weights")


# -- files


def test_the_run_folder(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    files = ("last.pt", "best.pt", "step-12.pt")
    kept = {f"checkpoints/{name}{ending}" for name in files for ending in ("", ".sha256")}
    assert names == {"metrics.jsonl", "summary.json", "train.log", *kept}
    assert {
        *("status", "epochs", "steps", "best_epoch", "best_val_loss", "best_val_accuracy", "test_loss"),
        *("test_accuracy", "seconds", "parameters", "parallel", "processes", "resumed_from"),
    } <= set(summary)
    assert (summary["status"], summary["epochs"], summary["steps"]) == ("finished", 4, 16)
    assert (summary["parallel"], summary["processes"], summary["resumed_from"]) == ("single", 1, [])
    assert summary["parameters"] == sum(
        value.numel() for name, value in result(whole)["model"].items() if name.endswith(("weight", "bias"))
    )


def test_metrics_lines(whole: Path) -> None:
    text = (whole / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and text.endswith("}\n")
    keys = {"epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds"}
    keys |= {"samples_per_second"}
    lines = metrics(whole)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 4), (2, 8), (3, 12), (4, 16)]
    for line in lines:
        assert keys == set(line) and all(math.isfinite(value) for value in line.values())
        assert 0 <= line["train_accuracy"] <= 1 and 0 <= line["val_accuracy"] <= 1
        assert line["train_accuracy"] * 90 == pytest.approx(round(line["train_accuracy"] * 90))
        assert line["val_accuracy"] * 30 == pytest.approx(round(line["val_accuracy"] * 30))


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "step-12.pt"])
def test_checkpoint_contents(whole: Path, name: str) -> None:
    state = torch.load(whole / "checkpoints" / name, weights_only=True)
    assert set(state) == KEYS
    assert {"epoch", "step", "position", "sums", "stopping"} <= set(state["progress"])
    model = build_workload(run_config(*RICH)).module
    assert list(state["model"]) == list(model.state_dict())
    assert state["config"]["optimizer"]["lr"] == 0.1
    assert set(state["ema"]) == set(state["model"])
    assert len(state["optimizer"]["state"]) == len(list(model.parameters()))


def test_stopping_early(tmp_path: Path) -> None:
    overrides = [*SMALL, "stopping=early", "stopping.patience=2", "monitor=val_loss", "schedule=constant"]
    summary = start(tmp_path, *overrides, "optimizer.lr=1e-30", "epochs=50", "model.norm=none")
    assert (summary["status"], summary["epochs"], summary["best_epoch"]) == ("stopped_early", 3, 1)
    assert runner.CODE_OF[summary["status"]] == 0


# -- status


def status(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["status"])


def test_exit_codes_and_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with at_update(5, terminate):
        assert execute(tmp_path / "a", *RICH) == 75
    assert status(tmp_path / "a") == "interrupted"
    assert execute(tmp_path / "a", *RICH) == 0
    assert status(tmp_path / "a") == "finished"
    assert execute(tmp_path / "b", *RICH, "max_time=0.00001") == 75
    assert status(tmp_path / "b") == "interrupted"


@pytest.mark.parametrize("keys", [[], ["evaluate.tta=flip"]])
def test_a_signal_in_the_final_test(keys: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The run ends at once, and makes no further update when it is resumed."""
    tested = evaluate.test_report

    def interrupted(*arguments: Any) -> TestReport | None:
        terminate()
        return tested(*arguments)

    with patch("dlopt.training.run.test_report", interrupted):
        assert execute(tmp_path / "cut", *RICH, *keys) == 75
    assert status(tmp_path / "cut") == "interrupted"
    assert execute(tmp_path / "cut", *RICH, *keys) == 0
    whole = start(tmp_path / "whole", *RICH, *keys)
    summary = json.loads((tmp_path / "cut/summary.json").read_text())
    assert {**summary, **DIFFERENT} == {**whole, **DIFFERENT} and whole["test_loss"] is not None


DIFFERENT: dict[str, Any] = {"seconds": 0.0, "peak_memory": 0, "resumed_from": [], "run_id": ""}


def test_nonfinite_loss_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = [*SMALL, "model.norm=none", "optimizer.lr=1e30", "schedule=constant", "checkpoint.every_steps=1"]
    assert execute(tmp_path, *overrides) == 1
    assert status(tmp_path) == "failed"
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and "Traceback" not in errors
    assert "the loss became" in errors and "learning rate of 1e+30" in errors and "optimizer.lr" in errors


@pytest.mark.parametrize("twice", [False, True])
def test_sigint(tmp_path: Path, twice: bool, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        for _ in range(1 + twice):
            os.kill(os.getpid(), signal.SIGINT)

    with at_update(6, interrupt):
        assert execute(tmp_path, *RICH) == 75
    assert load(tmp_path / "checkpoints/last.pt").step == (4 if twice else 6)
    assert resume(tmp_path, *RICH)["status"] == "finished"


def test_a_folder_that_is_replaced_during_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, other = tmp_path / "run", {"config.yaml": "run_id: another\n", "summary.json": "{}"}

    def replace() -> None:
        run.rename(tmp_path / "renamed")
        run.mkdir()
        for name, text in other.items():
            (run / name).write_text(text)

    run.mkdir()
    plain = run_config(*SMALL, "epochs=4")
    named = dataclasses.replace(plain, config={"run_id": "own", **plain.config})
    with at_update(6, replace):
        assert runner.exit_code(TrainingRun(named, run, overrides=[]), console=False) == 1
    assert re.search("run: during the run, .* was renamed to .*/renamed; resume with", capfd.readouterr().err)
    assert {path.name: path.read_text() for path in run.iterdir()} == other
    assert load(tmp_path / "renamed/checkpoints/last.pt").step == 4


def test_errors_before_the_first_update_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stopping=early.*data\.val_split"):
        start(tmp_path, *SMALL, "stopping=early", "data.val_split=0")
    with pytest.raises(UserError, match=r"batch norm .* one value per channel"):
        start(tmp_path, *SMALL, "model.norm=batch", "data.batch_size=1")
    with pytest.raises(UserError, match="init_from"):
        start(tmp_path, *SMALL, f"init_from={tmp_path}/nothing.pt")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("evaluations", "is_refused"),
    [
        ([], True),
        (["data.val_split=0"], True),
        (["evaluate.test=false"], True),
        (["data.val_split=0", "evaluate.test=false"], False),
    ],
)
def test_crops_larger_than_the_evaluated_images(evaluations: list[str], is_refused: bool, tmp_path: Path) -> None:
    lines = ["augmentation=imagenet_small", "epochs=1", *evaluations]
    if not is_refused:
        assert start(tmp_path, *SMALL, *lines)["status"] == "finished"
        return
    with pytest.raises(UserError, match=r"32x32 crops, but the test images have only 8x8 .*; set data\.image_size=32"):
        start(tmp_path, *SMALL, *lines)
    assert not list(tmp_path.iterdir())


# -- real processes


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "dlopt", "train", *overrides, f"hydra.run.dir={folder}"]


def wait_for(path: Path, process: subprocess.Popen[bytes], lines: int) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


LONG = [*RICH, "epochs=50"]


WORKERS = ["data.memory=false", "data.workers=2"]


def test_ends_all_loader_workers(tmp_path: Path) -> None:
    """Also those of the loader that evaluates, and while something still holds the loaders."""
    kept: set[Batches] = set()

    def observe(workload: Workload, *_: object) -> tuple[()]:
        kept.update(workload.opened)
        object.__setattr__(workload, "opened", kept)
        return ()

    before = set(multiprocessing.active_children())
    with Interruption() as interruption:
        run = TrainingRun(run_config(*RICH, *WORKERS, "epochs=1"), tmp_path)
        train_run(run, interruption, Tools(observe=observe), console=False)
    assert len(kept) >= 2 and set(multiprocessing.active_children()) <= before


def test_a_long_run_accumulates_nothing(tmp_path: Path) -> None:
    """Neither files, descriptors and threads, nor objects and tensors in memory."""
    assert in_fork(lambda: _accumulates_nothing(tmp_path)) == 0  # without the threads of other tests, and their objects


def _accumulates_nothing(folder: Path) -> None:
    seen: list[dict[str, Any]] = []
    types: list[Counter[type]] = []

    def look() -> None:
        gc.collect()
        objects = gc.get_objects()
        types.append(Counter(map(type, objects)))
        seen.append({
            "files": len(list(folder.rglob("*"))), "threads": threading.active_count(),
            "descriptors": len(os.listdir("/dev/fd")),
            "tensors": sum(each.numel() for each in objects if isinstance(each, Tensor)),
        })  # fmt: skip

    every = ["evaluate.every_epochs=20", "checkpoint.every_epochs=20", "log_every_steps=1", "epochs=161"]
    with at_update(162, look), at_update(642, look):
        start(folder, *RUN, "ema=0.9", *every)
    early, late = seen
    assert late == early
    more = types[1] - types[0]
    # Caches of Python grow with each of the 24 evaluations: patterns of files, types of abstract classes.
    assert more.total() < 480, f"less than an object per update: {more.most_common(5)}"


@pytest.fixture(scope="module")
def whole_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a long run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder, *LONG)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "extra", "stops"),
    [(signal.SIGTERM, WORKERS, [4, 20]), (signal.SIGUSR1, [], [4]), (signal.SIGKILL, WORKERS, [20])],
    ids=["term", "usr1", "kill"],
)
def test_signals_to_a_process_group(
    tmp_path: Path, whole_long: Path, number: signal.Signals, extra: list[str], stops: list[int]
) -> None:
    """Signals the process group after some epochs, as a cluster does; then `resume=auto`."""
    folder, resumed_from = tmp_path / "stopped", list[int]()
    for lines in (*stops, None):
        overrides = [*LONG, *extra, *(["resume=auto"] if resumed_from else [])]
        process = subprocess.Popen(command(folder, *overrides), start_new_session=True, stdout=subprocess.DEVNULL)
        if lines is not None:
            wait_for(folder / "metrics.jsonl", process, lines)
            os.killpg(process.pid, number)
            assert process.wait(300) == (-signal.SIGKILL if number == signal.SIGKILL else 75)
            if number != signal.SIGKILL:
                assert status(folder) == "interrupted"
            resumed_from.append(load(folder / "checkpoints/last.pt").step)
        else:
            assert process.wait(300) == 0
    assert json.loads((folder / "summary.json").read_text())["resumed_from"] == resumed_from
    assert timeless(folder) == timeless(whole_long)
    left, right = result(folder), result(whole_long)
    for key in ("model", "optimizer", "ema", "schedule"):
        assert same(left[key], right[key]), key


def test_resuming_keeps_the_best_epoch_where_only_rank_0_sees_its_file(tmp_path: Path) -> None:
    """On another node without the run folder, whose ranks would go on with another best epoch."""
    epochs = []
    original = Trainer.load_state_dict

    def load_state_dict(self: Trainer, state: Any) -> None:
        original(self, state)
        epochs.append(self.best.epoch)

    with at_update(6, terminate):
        start(tmp_path, *RUN)
    with (
        patch.object(Trainer, "load_state_dict", load_state_dict),
        patch.object(Checkpoints, "has_best", lambda self, epoch, run_id: False),
        patch.object(Ranks, "broadcast", lambda self, value: True if value is False else value),
    ):
        resume(tmp_path, *RUN)
    assert epochs == [1]


@pytest.mark.parametrize(("stopping", "is_said"), [("none", False), ("target", True)])
def test_a_run_that_ends_before_its_average_begins(tmp_path: Path, stopping: str, *, is_said: bool) -> None:
    """Its last quarter is that of the length that was typed."""
    lines = [f"stopping={stopping}", *["stopping.monitor=train_loss", "stopping.value=100"][: 2 * is_said]]
    start(tmp_path, *SMALL, "ema=tail", "epochs=4", *lines)
    text = "ema=tail: the run ended after update 4, its average begins to differ from its weights with update 14"
    assert (text in (tmp_path / "train.log").read_text()) == is_said
