"""curves.png: what a run draws at its end, and which runs draw."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt.python import api
from dlopt.results import curves
from dlopt.schedules.scheduler import Scheduler
from tests.support.line import SMALL, dlopt, only
from tests.support.schedules import make

pytestmark = pytest.mark.drawn

CHOICES = {"model": "mlp", "data": "digits", "optimizer": "sgd"}
PNG = b"\x89PNG"
TRACKED = (*SMALL, "tracking=[tensorboard]")


def line(epoch: int, **values: Any) -> dict[str, Any]:
    metrics = {"train_loss": 2.0 / epoch, "train_accuracy": 0.5, "val_loss": 3.0 / epoch, "val_accuracy": 0.25}
    return {"epoch": epoch, "step": 10 * epoch, "lr": 0.1 / epoch, **metrics, **values}


def lines(axes: Any) -> dict[str, list[float]]:
    return {str(each.get_label()): [float(y) for y in each.get_ydata()] for each in axes.get_lines()}


def test_losses_accuracies_and_rates() -> None:
    summary = {"best_epoch": 2, "test_accuracy": 0.9725, "test_loss": 0.1}
    figure = curves.draw([line(1), line(2)], summary, CHOICES, [])
    loss, accuracy, rate = figure.axes
    assert lines(loss) == {"training": [2.0, 1.0], "validation": [3.0, 1.5], "best: epoch 2": [1.5]}
    assert lines(accuracy) == {"training": [50, 50], "validation": [25, 25], "best: epoch 2": [25]}
    assert [*lines(rate).values()] == [[0.1, 0.05]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "validation", "best: epoch 2"]
    assert figure.get_suptitle() == "mlp on digits, sgd: test accuracy 97.25 %"
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy (%)", "learning rate (end of epoch)"]


def test_a_line_for_each_validation_set_with_a_name() -> None:
    history = [line(epoch, val_shaded_loss=5.0 / epoch, val_shaded_accuracy=0.75, val_a_b_loss=1.0) for epoch in (1, 2)]
    config = {"validation.shaded.data": "shaded_digits", "validation.a_b.use": "test", "monitor": "val_shaded_loss"}
    figure = curves.draw(history, {"best_epoch": 2}, CHOICES, [], config)
    loss, accuracy, _ = figure.axes
    assert lines(loss) == {
        "training": [2.0, 1.0], "validation": [3.0, 1.5], "validation: shaded": [5.0, 2.5], "validation: a_b": [1, 1],
        "best: epoch 2": [2.5],
    }  # fmt: skip
    assert lines(accuracy)["validation: shaded"] == lines(accuracy)["best: epoch 2"] * 2 == [75, 75]
    shaded, best = (each for each in loss.get_lines() if each.get_label() in ("validation: shaded", "best: epoch 2"))
    assert shaded.get_color() == best.get_color()


def test_marks_restarts() -> None:
    figure = curves.draw([line(1), line(2), line(3)], {}, CHOICES, [1.0, 2.5])
    for axes in figure.axes:
        positions = [each.get_xdata() for each in axes.get_lines() if each.get_linestyle() == ":"]
        assert [list(map(float, position)) for position in positions] == [[1.0, 1.0], [2.5, 2.5]]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["training", "validation", "restart of the schedule"]


def test_regression_without_validation_and_with_missing_losses() -> None:
    history = [{"epoch": epoch, "lr": 0.1, "train_loss": loss} for epoch, loss in ((1, 900.0), (2, None), (3, 0.5))]
    figure = curves.draw(history, {"test_loss": 0.25, "best_epoch": None}, {}, [])
    loss, _ = figure.axes
    assert list(lines(loss)) == ["training"] and loss.get_yscale() == "log"
    assert figure.get_suptitle() == "test loss 0.2500"


def test_a_schedule_knows_its_restarts() -> None:
    def scheduler(factor: Any) -> Scheduler:
        return Scheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), factor)

    assert scheduler(make("cosine_restarts", steps=70, T_0_steps=10, T_mult=2)).restarts == [10, 30]
    assert list(scheduler(make("constant", steps=70)).restarts) == []


def test_a_run_draws_and_names_the_picture_and_the_next_commands(tmp_path: Path) -> None:
    overrides = ("schedule=cosine_restarts", "schedule.warmup_epochs=0", "schedule.T_0_epochs=1", "schedule.T_mult=1")
    done = dlopt(tmp_path, "train", *TRACKED, *overrides, "hydra.run.dir=my run")
    assert done.code == 0, done.err
    assert (tmp_path / "my run/curves.png").read_bytes().startswith(PNG)
    shown = [each.strip() for each in done.out.split("run folder: ")[1].splitlines()]
    assert shown[:6] == [
        "my run",
        "curves: my run/curves.png",
        "pictures of the test: `dlopt eval 'my run'` draws them",
        "next:",
        "dlopt eval checkpoint='my run'",
        "dlopt report .",
    ]
    assert shown[-1] == 'in Python: dlopt.load("my run")'


def test_restarts_are_passed_in_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[Any] = []
    monkeypatch.setattr(curves, "write", lambda folder, restarts: passed.append((folder, restarts)) or folder)
    overrides = ("schedule=cosine_restarts", "schedule.warmup_epochs=0", "schedule.T_0_epochs=1", "schedule.T_mult=1")
    assert dlopt(tmp_path, "train", *TRACKED, "epochs=3", *overrides, "hydra.run.dir=run").code == 0
    assert passed == [(tmp_path / "run", [1.0, 2.0])]


def test_an_error_in_the_picture_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(curves, "draw", fail)
    done = dlopt(tmp_path, "train", *TRACKED, "hydra.run.dir=run")
    assert done.code == 0 and "the metrics could not be drawn: RuntimeError: no font" in done.out
    assert "curves:" not in done.out and "dlopt report" in done.out


def test_sweeps_library_calls_and_minimal_tracking_draw_nothing(tmp_path: Path) -> None:
    assert dlopt(tmp_path, "train", *SMALL, "hydra.run.dir=minimal").code == 0
    assert dlopt(tmp_path, "train", "-m", *TRACKED, "seed=0,1", "hydra.sweep.dir=sweep").code == 0
    with contextlib.chdir(tmp_path):
        api.train([*TRACKED, "hydra.run.dir=library"])
    assert only(tmp_path, "sweep/0/summary.json").exists()
    assert not list(tmp_path.rglob("curves.png"))
