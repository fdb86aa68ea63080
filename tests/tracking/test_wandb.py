"""Weights & Biases without an account or a network."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from dlopt.tracking.tracking import Tracking
from tests.support.lengths import constant

pytestmark = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


def run(folder: Path, epochs: range) -> str:
    with Tracking(folder, sinks=["wandb"], console=False) as tracking:
        tracking.begin({"name": "x", "optimizer": {"lr": 0.1}}, {}, constant(4, 1))
        for epoch in epochs:
            tracking.epoch({"epoch": epoch, "step": epoch, "train_loss": 1 / epoch})
        tracking.finish({"status": "finished", "steps": epochs[-1]})
    return (folder / "train.log").read_text()


@pytest.mark.slow
def test_offline_runs_are_in_the_run_folder_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "without it" not in run(tmp_path, range(1, 3))
    [name] = (tmp_path / "wandb.id").read_text().split()
    assert "without it" not in run(tmp_path, range(3, 5))
    assert (tmp_path / "wandb.id").read_text().split() == [name]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))) >= 1


@pytest.mark.slow
def test_without_an_account_fails_without_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    assert "no account: set WANDB_API_KEY, or WANDB_MODE=offline; training continues" in run(
        tmp_path / "run", range(1, 2)
    )
