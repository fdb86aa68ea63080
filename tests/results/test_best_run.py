"""The best run of a sweep, and the commands that take it."""

from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.results.best_run import best_run
from tests.support.folders import make_run
from tests.support.line import dlopt, refused


def make_sweep(folder: Path) -> None:
    (folder / "sweep.yaml").write_text("{}")


def test_takes_the_best_run_of_the_first_row(tmp_path: Path) -> None:
    """Not the best run of all: adamw's second seed is the luckiest."""
    for number, (optimizer, seed, accuracy) in enumerate(
        [("sgd", 0, 0.88), ("sgd", 1, 0.9), ("adamw", 0, 0.5), ("adamw", 1, 0.95)]
    ):
        make_run(tmp_path / f"{number}", optimizer=optimizer, seed=seed, accuracies=(0.3, accuracy))
    make_run(tmp_path / "4", optimizer="sgd", seed=2, status="failed", accuracies=(0.3, 0.2))
    make_sweep(tmp_path)
    found = best_run(tmp_path, "checkpoint")
    assert found is not None
    folder, text = found
    assert folder == tmp_path / "1"
    assert text.startswith("best of 5 runs: ") and text.endswith("/1 (val_accuracy 90.00 %, optimizer=sgd)")


def test_by_a_loss(tmp_path: Path) -> None:
    for number, losses in enumerate([(0.5, 0.4), (0.5, 0.3), (0.5, 0.45)]):
        make_run(
            tmp_path / f"{number}", seed=number, losses=losses, accuracies=(0.5, 0.6), config={"monitor": "val_loss"}
        )
    make_sweep(tmp_path)
    found = best_run(tmp_path, "checkpoint")
    assert found is not None and found[0] == tmp_path / "1"


def test_without_runs_or_values(tmp_path: Path) -> None:
    assert best_run(tmp_path, "checkpoint") is None
    assert best_run(tmp_path / "missing", "checkpoint") is None
    make_run(tmp_path / "0", status="failed", accuracies=())
    assert best_run(tmp_path, "checkpoint") is None, "no sweep"
    make_sweep(tmp_path)
    with pytest.raises(UserError, match=r"none of its 1 runs? has finished with a val_"):
        best_run(tmp_path, "checkpoint")


def test_commands_take_a_sweep(tmp_path: Path) -> None:
    small = ["model=mlp", "model.widths=[32]", "data.subset=600", "epochs=2", "tracking=[]", "threads=1"]
    swept = dlopt(tmp_path, "train", "-m", *small, "optimizer.lr=1e-9,0.1", "hydra.sweep.dir=sweep")
    assert swept.code == 0, swept.err
    tested = dlopt(tmp_path, "eval", "sweep")
    assert tested.code == 0 and "best of 2 runs: " in tested.err and "sweep/1 (val_accuracy" in tested.err
    assert (tmp_path / "sweep/1/eval.json").exists() and not (tmp_path / "sweep/0/eval.json").exists()
    exported = dlopt(tmp_path, "export", "checkpoint=sweep", "format=safetensors")
    assert exported.code == 0 and (tmp_path / "sweep/1/best.safetensors").exists()
    (tmp_path / "empty").mkdir()
    assert "contains neither best.pt nor last.pt" in refused(tmp_path, "eval", "empty")
