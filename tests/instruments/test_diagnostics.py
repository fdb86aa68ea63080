"""Diagnostics during training: correct metrics, and a bitwise identical training."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.instruments.diagnostics import Diagnostics
from dlopt.lab.diagnosis.measuring import prepare
from dlopt.tracking.metrics import read_metrics
from dlopt.tracking.tracking import Tracking
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.builders.workload import build_workload
from tests.support.runs import RICH, SMALL, result, resume, run_config, same, start

DIAGNOSTICS = ["diagnostics=[gradients,activations,curvature]", "diagnostics_every=3", "tracking=[tensorboard]"]


@pytest.mark.parametrize(
    "typed",
    [
        [*RICH, "epochs=2", "clip=norm", "clip.max_norm=0.5"],
        [*SMALL[:-5], "threads=1", "device=cpu", "model=resnet20", "steps=4", "model.dropout=0.2", "accumulate=2"],
        [*SMALL, "optimizer=lbfgs", "steps=4", "data.batch_size=full"],
    ],
    ids=["augmentation, dropout, averages, clipping", "batch norm, micro-batches", "many evaluations"],
)
def test_training_is_bitwise_identical(tmp_path: Path, typed: list[str]) -> None:
    start(tmp_path / "plain", *typed)
    start(tmp_path / "watched", *[line for line in typed if line != "tracking=[]"], *DIAGNOSTICS)
    assert same(result(tmp_path / "plain"), result(tmp_path / "watched"))


def _reports(tmp_path: Path, *typed: str, steps: int = 7) -> dict[int, tuple[dict[str, float], dict[str, Tensor]]]:
    """Returns the diagnostics of the first updates, by the number of updates."""
    reports: dict[int, Any] = {}
    workload = build_workload(run_config(*SMALL, *DIAGNOSTICS, *typed))
    settings = workload.run_config.settings
    report = lambda number, figures, histograms: reports.update({number: (figures, histograms)})  # noqa: E731
    diagnostics = Diagnostics(workload, settings.diagnostics, settings.diagnostics_every, report)
    trainer = probe_trainer(workload, tmp_path, observers=[diagnostics])
    batches = [batch for epoch in range(steps) for batch in trainer.batches.epoch(epoch)]
    workload.module.train()
    for number, batch in enumerate(batches[:steps]):
        trainer.run_update(batch, number)
    return reports


def test_metrics_match_the_update(tmp_path: Path) -> None:
    typed = ("precision=fp64", "model.norm=none", "optimizer.momentum=0", "schedule=constant", "optimizer.lr=0.1")
    reports = _reports(tmp_path, *typed, "clip=norm", "clip.max_norm=1e-3")
    assert list(reports) == [1, 4, 7]  # updates 0, 3, 6
    metrics, histograms = reports[1]
    workload, training = prepare(run_config(*SMALL, *typed), tmp_path)
    inputs, targets = next(iter(training.batches.epoch(0)))
    module = workload.module
    loss = workload.loss(module(inputs), targets)
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm_before = float(torch.cat([g.flatten() for g in gradients]).norm())
    names = [name for name, _ in module.named_parameters()]
    head = [g for name, g in zip(names, gradients, strict=True) if name.startswith("head.")]
    norm = float(torch.cat([g.flatten() for g in head]).norm())
    assert metrics["gradients/norm/head"] == pytest.approx(norm, rel=1e-5)  # before clipping
    weights = torch.cat([p.detach().flatten() for name, p in module.named_parameters() if name.startswith("head.")])
    step = 0.1 * norm * 1e-3 / norm_before  # after it
    assert metrics["gradients/update_to_weight/head"] == pytest.approx(step / float(weights.norm()), rel=1e-4)
    assert metrics["activations/std/head"] == pytest.approx(float(module(inputs).std(correction=0).detach()), rel=1e-9)
    assert {"activations/dead/layer1.linear", "gradients/noise_scale", "curvature/along_update"} <= set(metrics)
    assert set(histograms) == {
        f"{kind}/{name}" for kind in ("activations", "gradients") for name in ("layer1.linear", "head")
    }


@pytest.mark.parametrize("optimizer", ["sam", "lbfgs", "newton", "sophia"])
def test_records_the_first_evaluation_of_an_update(tmp_path: Path, optimizer: str) -> None:
    """These optimizers evaluate the loss at several weights, or differentiate it twice."""
    typed = ("model.widths=[4]", "diagnostics=[gradients,activations]")
    (expected, values), (metrics, histograms) = (
        _reports(tmp_path, *typed, f"optimizer={name}", "data.batch_size=25", steps=1)[1] for name in ("sgd", optimizer)
    )
    for name in ("gradients/backpropagated/head", "gradients/norm/head", "activations/std/head"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
    assert len(histograms["gradients/head"]) == len(values["gradients/head"])


def test_eigenvalue_converges_over_measurements(tmp_path: Path) -> None:
    """Lanczos starts from the previous eigenvector; with a tiny learning rate the Hessian is constant."""
    typed = ("precision=fp64", "data.batch_size=full", "schedule=constant", "optimizer.lr=1e-9", "diagnostics_every=1")
    reports = _reports(tmp_path, *typed, steps=21)
    workload, training = prepare(run_config(*SMALL, *typed), tmp_path)
    [batch] = training.batches.epoch(0)
    from dlopt.lab.diagnosis.measuring import snapshot

    spectrum = snapshot(workload, [batch], 0, eigenvalues=1, iterations=60).spectrum
    assert spectrum is not None
    first, second = (reports[number][0]["curvature/largest_eigenvalue"] for number in (1, 21))
    assert "curvature/largest_eigenvalue" not in reports[2][0]
    assert first < second == pytest.approx(float(spectrum.eigenvalues[0]), rel=0.05)


def test_no_observers_by_default(tmp_path: Path) -> None:
    trainer = probe_trainer(build_workload(run_config(*SMALL)), tmp_path)
    assert trainer.run_update == trainer.step.update


def test_logs_the_same_updates_after_resume(tmp_path: Path) -> None:
    typed = [line for line in SMALL if line != "tracking=[]"]
    reported: list[int] = []

    def diagnostics(self: Tracking, step: int, values: dict[str, float], histograms: dict[str, Tensor]) -> None:
        reported.append(step)
        original(self, step, values, histograms)

    original = Tracking.diagnostics
    with mock.patch.object(Tracking, "diagnostics", diagnostics):
        start(tmp_path, *typed, *DIAGNOSTICS, "epochs=1")  # four updates
        resume(tmp_path, *typed, *DIAGNOSTICS, "epochs=2", "schedule_epochs=2")
    assert reported == [1, 4, 7]
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"gradients/norm/head" in written and b"curvature/largest_eigenvalue" in written
    lines = read_metrics(tmp_path, "diagnostics.jsonl")
    assert [line["step"] for line in lines] == reported and all(line["gradients/norm/head"] > 0 for line in lines)


def test_rejects_unsupported_settings() -> None:
    with pytest.raises(UserError, match=r"diagnostics\.0=loss|diagnostics"):
        run_config("diagnostics=[loss]")
