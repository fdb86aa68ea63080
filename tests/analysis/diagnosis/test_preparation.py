"""Trainers for diagnosis from checkpoints."""

from pathlib import Path

from dlopt.analysis.diagnosis.preparation import prepare
from dlopt.training.checkpoint import load
from tests.training.runs import SMALL, experiment, start


def test_prepares_gpu_checkpoint_on_a_cpu(tmp_path: Path) -> None:
    """CUDA graphs set capturable=true in the checkpoint, which torch rejects on a CPU."""
    lines = [*SMALL, "optimizer=adamw", "+optimizer.fused=false", "epochs=1"]
    start(tmp_path, *lines)
    state = load(tmp_path / "checkpoints/last.pt")
    state["optimizer"]["param_groups"][0]["capturable"] = True
    _, training = prepare(experiment(*lines), tmp_path / "other", state)
    inputs, targets = next(iter(training.batches.epoch(1)))
    training.step.update(inputs, targets, training.progress.step, training.train_metrics)
    assert not training.step.optimizer.param_groups[0]["capturable"]


def test_prepares_checkpoint_of_a_run_with_automatic_learning_rate(tmp_path: Path) -> None:
    lines = [*SMALL, "optimizer.lr=auto", "schedule=constant", "epochs=1"]
    summary = start(tmp_path, *lines)
    _, training = prepare(experiment(*lines), tmp_path / "other", load(tmp_path / "checkpoints/last.pt"))
    assert training.step.rate == summary["found_lr"]
