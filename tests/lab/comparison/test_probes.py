"""Probes of checkpoints against their definitions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dlopt import train
from dlopt.basics.errors import UserError
from dlopt.config.parsing import parse
from dlopt.config.resolve import resolve_saved
from dlopt.data.samples import Samples
from dlopt.lab.comparison import probes
from dlopt.lab.comparison.probes import checkpoints, effective_rate, gradient_variance
from dlopt.training.builders.batches import evaluation_batches, training_batches
from dlopt.training.builders.workload import Workload, build_workload
from dlopt.training.checkpoint.content import Checkpoint
from tests.support.runs import run_config


def test_gradient_variance_matches_sampling(tmp_path: Path) -> None:
    train(
        ["model=mlp", "model.norm=none", "model.widths=[4]", "data.subset=23", "data.val_split=0.0", "epochs=1",
         "data.batch_size=5", "sampler=class_sorted", "tracking=[]", "threads=1", f"hydra.run.dir={tmp_path}/run"]
    )  # fmt: skip
    folder = tmp_path / "run"
    result = gradient_variance(folder)
    assert [progress["epoch"] for progress, _ in result] == [0, 1]

    [checkpoint] = checkpoints(folder)
    workload = build_workload(parse(resolve_saved(checkpoint.config)), checkpoint)
    batches = evaluation_batches(workload, workload.dataset.train).epoch(0)
    inputs, targets = (torch.cat(each) for each in zip(*batches, strict=True))
    workload.module.load_state_dict(checkpoint.model)

    def gradient(indices: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(workload.module(inputs[indices]), targets[indices])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(workload.module.parameters()))])

    mean = gradient(torch.arange(23))
    sampler = training_batches(workload).sampler
    epochs_of_batches = [batch for epoch in range(1, 11) for batch in sampler.order(epoch)[:20].split(5)]
    variance = torch.stack([(gradient(batch) - mean).square().sum() for batch in epochs_of_batches]).mean()
    generator = torch.Generator().manual_seed(0)
    random_batches = [torch.randperm(23, generator=generator)[:5] for _ in range(2000)]
    at_random = torch.stack([(gradient(batch) - mean).square().sum() for batch in random_batches]).mean()
    assert result[1][1] == pytest.approx(float(variance / at_random), rel=0.04)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.9)),  # no momentum
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.9), amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
        lambda p: torch.optim.Adagrad(p, lr_decay=0.5),
    ],
)
def test_effective_rate_is_the_step_per_gradient(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    weights = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = make([weights])
    for scale in (100.0, 1.0, 0.1):  # the largest average is not the last one
        before = weights.detach().clone()
        weights.grad = scale * torch.arange(1.0, 6.0, dtype=torch.float64)
        optimizer.step()
    saved = Checkpoint({"optimizer": optimizer.state_dict(), "progress": {"epoch": 1, "step": 3, "seconds": 1.0}})
    monkeypatch.setattr(probes, "checkpoints", lambda folder: [saved])
    [(_, rate)] = effective_rate(Path())
    assert rate == pytest.approx(float(((before - weights.detach()) / weights.grad).median()), rel=1e-9)


def test_effective_rate_of_an_optimizer_that_counts_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"lr": 0.3, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}
    optimizer = {"param_groups": [group], "state": {0: {"exp_avg_sq": torch.ones(2)}}}  # as Prodigy's
    progress = {"epoch": 1, "step": 3, "seconds": 1.0}
    saved = Checkpoint({"optimizer": optimizer, "progress": progress})
    monkeypatch.setattr(probes, "checkpoints", lambda folder: [saved])
    assert effective_rate(Path()) == [(progress, pytest.approx(0.3))]


def test_evaluated_losses_are_those_without_dropout() -> None:
    lines = ["data.subset=60", "data.val_split=0.5", "model=mlp", "model.widths=[16]", "model.dropout=0.9", "epochs=1"]
    trained = build_workload(run_config(*lines, "threads=1"))
    samples = [next(iter(evaluation_batches(trained, each, batch_size="full").epoch(0))) for each in splits(trained)]
    trained.module.eval()
    with torch.no_grad():
        train, val = (float(trained.loss(trained.module(inputs), targets)) for inputs, targets in samples)
    trained.module.train()
    assert probes.evaluated_train_loss(trained) == pytest.approx(train, rel=1e-5)
    assert probes.evaluated_gap(trained) == pytest.approx(val - train, rel=1e-3)


def splits(workload: Workload) -> tuple[Samples, Samples]:
    assert workload.dataset.val is not None
    return workload.dataset.train, workload.dataset.val


def test_the_evaluated_gap_needs_validation_samples() -> None:
    made = build_workload(run_config("data.subset=60", "data.val_split=0.0", "model=mlp", "threads=1"))
    with pytest.raises(UserError, match="evaluated_gap needs validation samples"):
        probes.evaluated_gap(made)


def test_first_updates_of_adam_are_one_learning_rate(tmp_path: Path) -> None:
    """The first update of Adam is lr times the sign of the gradient, for every weight that has a gradient."""
    line = ["model=mlp", "model.norm=none", "model.widths=[]", "data.subset=64", "data.val_split=0.0", "epochs=1"]
    own = ["optimizer=adam", "optimizer.lr=0.01", "schedule=constant", "data.batch_size=full", "tracking=[]"]
    train([*line, *own, "normalize=mean_pixel", "threads=1", f"hydra.run.dir={tmp_path}/run"])
    [(progress, value)] = probes.first_updates(tmp_path / "run")
    assert progress["step"] == 1 and 0.8 < value < 1.0001  # pixels at the edges are constant
