"""Tests of the final test with test-time augmentation."""

import json
from pathlib import Path

import pytest

from dlopt.training import run
from tests.support.line import dlopt, refused
from tests.support.runs import start
from tests.support.sizes import SMALL

CONVOLUTIONS = ("model=airbench94", "model.widths=[4,4,4]", "data.subset=60", "epochs=1", "threads=1", "tracking=[]")


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_final_test_equals_eval_with_the_same_augmentation(tmp_path: Path, average: str) -> None:
    typed = ("evaluate.tta=shift_flip", f"evaluate.average={average}", "device=cpu", "hydra.run.dir=run")
    assert dlopt(tmp_path, "train", *CONVOLUTIONS, *typed).code == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    line = ("checkpoint=run/checkpoints/best.pt", "tta=shift_flip", f"average={average}", "device=cpu")
    assert dlopt(tmp_path, "eval", *line).code == 0
    metrics = json.loads((tmp_path / "run/eval.json").read_text())
    assert summary["test_loss"] == metrics["test_loss"] and summary["test_accuracy"] == metrics["test_accuracy"]
    assert dlopt(tmp_path, "eval", line[0], "device=cpu").code == 0
    plain = json.loads((tmp_path / "run/eval.json").read_text())
    assert summary["test_loss"] != plain["test_loss"]


def test_rejects_augmentation_of_vectors_before_training(tmp_path: Path) -> None:
    line = ("data=polynomial", "model=polynomial", "loss=mse", "evaluate.tta=flip", "hydra.run.dir=run")
    assert "are not images" in refused(tmp_path, "train", *line)


def test_rejects_probabilities_of_squared_errors_before_training(tmp_path: Path) -> None:
    line = (*CONVOLUTIONS, "loss=mse", "evaluate.tta=flip", "hydra.run.dir=run")
    assert "use evaluate.average=logits" in refused(tmp_path, "train", *line)
    assert dlopt(tmp_path, "train", *line, "evaluate.average=logits").code == 0


def test_without_the_final_test_the_test_set_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the test set was read")

    monkeypatch.setattr(run, "test_report", refuse)
    summary = start(tmp_path, *SMALL, "epochs=1", "evaluate.test=false")
    assert summary["status"] == "finished" and summary["test_loss"] is None and summary["best_val_loss"] > 0
