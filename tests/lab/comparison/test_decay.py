"""The measured decay of each weight against closed forms."""

from pathlib import Path

import pytest
import torch

from dlopt import train
from dlopt.basics.errors import UserError
from dlopt.lab.comparison import decay, probes
from dlopt.lab.comparison.decay import Decays

LINES = (
    "model=mlp", "model.norm=none", "model.widths=[8]", "data.subset=400", "epochs=2", "schedule=constant",
    "tracking=[]", "threads=1", "optimizer.lr=0.001",
)  # fmt: skip


def measured(folder: Path, *more: str) -> tuple[Decays, torch.Tensor]:
    """Returns the decays at the last checkpoint of a run, and Adam's corrected average of the squared gradients."""
    train([*LINES, *more, f"hydra.run.dir={folder}/run"])
    *_, checkpoint = probes.checkpoints(folder / "run")
    *_, (_, workload) = probes._models(folder / "run")
    found = decay.decays(workload, checkpoint)
    state, group = checkpoint.optimizer["state"], checkpoint.optimizer["param_groups"][0]
    rows, beta, steps = [state[i] for i in group["params"]], group["betas"][1], checkpoint.step
    return found, torch.cat([row["exp_avg_sq"].flatten() for row in rows]) / (1 - beta**steps)


def test_decoupled_decay_shrinks_every_weight_by_lr_times_decay(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, "optimizer=adamw", "optimizer.weight_decay=0.1")
    torch.testing.assert_close(found.moved, found.weights, rtol=0.1, atol=0.02)
    assert decay.ratio(found) == pytest.approx(1, abs=0.05)


def test_l2_in_adam_is_divided_by_the_root_of_the_second_moment(tmp_path: Path) -> None:
    """In a steady state the penalty moves a weight by lr * decay * w / sqrt(v), if it is small against the gradient."""
    found, squares = measured(tmp_path, "optimizer=adam", "optimizer.weight_decay=1e-5", "optimizer.betas=[0.0,0.9999]")
    assert decay.correlation(found) < -0.8
    large = found.weights.abs() > 0.1
    ratios = found.moved[large] * squares[large].sqrt() / found.weights[large]
    assert float(ratios.median()) == pytest.approx(1, rel=0.2)


def test_ratio_and_correlation_of_known_decays() -> None:
    weights, gradients = torch.linspace(1, 2, 100), torch.linspace(0.1, 10, 100)
    found = Decays(weights, weights / gradients, gradients)
    assert decay.correlation(found) == pytest.approx(-1) and decay.ratio(found) > 5
    assert decay.ratio(Decays(weights, 3 * weights, gradients)) == pytest.approx(1)


def test_a_run_without_decay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="decay_ratio and decay_correlation need a weight decay"):
        measured(tmp_path, "optimizer=adam", "optimizer.weight_decay=0")
