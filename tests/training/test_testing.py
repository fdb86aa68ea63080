"""The final test over several views of each image."""

import json
from pathlib import Path

import pytest

from tests.commands.line import dlopt, refused

CONVOLUTIONS = ("model=airbench94", "model.widths=[4,4,4]", "data.subset=60", "epochs=1", "threads=1", "tracking=[]")


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_the_final_test_is_that_of_eval_with_the_same_views(tmp_path: Path, average: str) -> None:
    typed = ("evaluate.tta=shift_flip", f"evaluate.average={average}", "device=cpu", "hydra.run.dir=run")
    assert dlopt(tmp_path, "train", *CONVOLUTIONS, *typed).code == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    view = ("checkpoint=run/checkpoints/best.pt", "tta=shift_flip", f"average={average}", "device=cpu")
    assert dlopt(tmp_path, "eval", *view).code == 0
    figures = json.loads((tmp_path / "run/eval.json").read_text())
    assert summary["test_loss"] == figures["test_loss"] and summary["test_accuracy"] == figures["test_accuracy"]
    assert dlopt(tmp_path, "eval", view[0], "device=cpu").code == 0
    plain = json.loads((tmp_path / "run/eval.json").read_text())
    assert summary["test_loss"] != plain["test_loss"]


def test_views_that_cannot_be_are_refused_before_the_training(tmp_path: Path) -> None:
    line = ("data=polynomial", "model=polynomial", "loss=mse", "evaluate.tta=flip", "hydra.run.dir=run")
    assert "are not images" in refused(tmp_path, "train", *line)
