import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlopt.basics.errors import RunError
from dlopt.tracking.metrics import read_metrics, read_summary
from dlopt.tracking.tracking import Tracking
from tests.support.lengths import constant

CONFIG = {"name": "try", "seed": 0, "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}}
METRICS = {"lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "val_loss": 1.1, "val_accuracy": 0.4, "seconds": 2.0}
METRICS |= {"samples_per_second": 9.0, "utilization": 0.4}


def train(
    folder: Path | None, last: int = 30, *, first: int = 0, log_every_steps: int | None = 5, **options: Any
) -> None:
    options = {"sinks": ["tensorboard"], "console": False, **options}
    with Tracking(folder, log_every_steps=log_every_steps, **options) as tracking:
        tracking.begin(CONFIG, {"train": 80}, constant(30, 10), first_step=first)
        tracking.images(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
        for step in range(first + 1, last + 1):
            tracking.advance(step)
            if step % 5 == 0:
                rate = {"throughput/samples_per_second": 8.0}
                tracking.step(step, {"train/loss": float(first), "grad_norm/global": 2.0, **rate})
            if step % 10 == 0:
                tracking.epoch({"epoch": step // 10, "step": step, **METRICS})
        if last == 30:
            tracking.finish({"status": "finished", "steps": 30, "test_loss": 1.2, "test_accuracy": 0.3})


def test_a_mark_that_no_row_has_is_not_explained(capsys: pytest.CaptureFixture[str]) -> None:
    train(None, console=True, sinks=[])
    shown = capsys.readouterr().out
    assert " 3/3 " in shown and "best epoch so far" not in shown


def scalars(folder: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_run_writes_its_files(tmp_path: Path) -> None:
    train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
        "train.log",
    ]
    assert read_metrics(tmp_path)[1] == {"epoch": 2, "step": 20, **METRICS}
    assert read_summary(tmp_path) == {"status": "finished", "steps": 30, "test_loss": 1.2, "test_accuracy": 0.3}
    assert scalars(tmp_path) == {
        "train/loss": [5, 10, 15, 20, 25, 30],
        "grad_norm/global": [5, 10, 15, 20, 25, 30],
        **{
            tag: [10, 20, 30] for tag in ("val/loss", "val/accuracy", "seconds")
        },  # the others have their points per step
        "throughput/samples_per_second": [5, 10, 15, 20, 25, 30],
        "test/loss": [30],
        "test/accuracy": [30],
    }


def test_without_step_logging_the_epochs_give_the_training_loss(tmp_path: Path) -> None:
    train(tmp_path, log_every_steps=None)
    assert scalars(tmp_path)["train/loss"] == [10, 20, 30]
    assert "grad_norm/global" not in scalars(tmp_path)


def test_a_resumed_run_continues_the_files(tmp_path: Path) -> None:
    train(tmp_path, last=28)
    train(tmp_path, first=14, resume_from=(1, 14))
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert scalars(tmp_path)["train/loss"] == [5, 10, 15, 20, 25, 30]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [0, 0, 14, 14, 14, 14]
    assert "resumes from step 14" in (tmp_path / "train.log").read_text()


def test_other_ranks_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train(None, sinks=[])
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_regression_without_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Tracking(tmp_path, sinks=["tensorboard"], console=True) as tracking:
        tracking.begin(CONFIG, {}, constant(1, 1))
        tracking.images(torch.zeros(8, 5))
        tracking.epoch({"epoch": 1, "step": 1, "lr": 0.1, "train_loss": 1.0, "val_loss": float("nan")})
        tracking.finish({"status": "finished", "test_loss": 1.2})
    assert "accuracy" not in capfd.readouterr().out
    assert set(scalars(tmp_path)) == {"train/loss", "val/loss", "lr", "test/loss"}
    assert read_metrics(tmp_path)[0]["val_loss"] is None


def test_log_holds_messages_library_warnings_and_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Tracking(tmp_path, sinks=[], console=False) as tracking:
        tracking.message("about to fail")
        logging.getLogger("some.package").warning("\x1b[31mtake care\x1b[0m")
        _ = 1 / 0
    log = (tmp_path / "train.log").read_text()
    for words in ("about to fail", "WARNING take care\n", "Traceback", "ZeroDivisionError"):
        assert words in log
    logging.getLogger("some.package").warning("after the run")
    assert "after the run" not in (tmp_path / "train.log").read_text()


def test_unwritable_folder_warns_per_file_and_only_the_summary_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"summary\.json"):
        train(tmp_path / "file" / "run", console=True)
    output = capfd.readouterr().out
    assert output.count("metrics.jsonl: cannot be written") == 1
    assert output.count("train.log: cannot be written") == 1
    assert output.count("tfevents") == 1
    assert "finished" in output, "the result is shown all the same"


def test_closing_is_safe_at_any_time(tmp_path: Path) -> None:
    tracking = Tracking(tmp_path, sinks=["tensorboard"], console=True)
    tracking.close()
    tracking.close()
    train(tmp_path)
    with Tracking(tmp_path, sinks=[], console=False, resume_from=(3, 30)) as tracking:
        tracking.finish({"status": "interrupted"})
        tracking.close()


def test_a_warning_about_the_machine_is_shown_once_after_the_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    metrics = {"epoch": 1, "step": 1, "train_loss": 1.0, "val_loss": 1.0, "seconds": 1.0}
    with Tracking(tmp_path, sinks=[], console=True) as tracking:
        tracking.begin({}, {}, constant(1, 1))
        logging.getLogger("dlopt.machine").warning("busy machine", extra={"at_end": True})
        logging.getLogger("some.package").warning("take care")
        tracking.epoch(metrics)
        tracking.finish({"status": "finished", "epochs": 1, "steps": 1})
    shown = capsys.readouterr().out
    assert shown.count("busy machine") == 1
    assert shown.index("take care") < shown.index("1/1") < shown.index("finished") < shown.index("busy machine")
    assert "busy machine" in (tmp_path / "train.log").read_text()
