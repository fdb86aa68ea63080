"""Diagnosis of small trainings: correct statistics, and unchanged training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlopt.lab.diagnosis.measuring import (
    STEP_FRACTIONS,
    Diagnosis,
    diagnose,
    differentiable_loss,
    prepare,
    preserved_state,
    snapshot,
    trace_updates,
)
from dlopt.lab.diagnosis.plots import clipping_factor, plots, spread_layers
from dlopt.optim.common import flat
from dlopt.training.checkpoint.checkpoints import load
from tests.support.runs import SMALL, run_config, same, start

pytestmark = pytest.mark.drawn

DEVICE = ["threads=1", "device=cpu"]
MLP = [*SMALL, "model.widths=[8,8]", "model.activation=tanh", "precision=fp64"]


def _diagnosed(tmp_path: Path, *overrides: str, **keys: Any) -> Diagnosis:
    workload, training = prepare(run_config(*MLP, *overrides), tmp_path)
    keys = {"batches": 3, "updates": 4, "eigenvalues": 2, "iterations": 5, **keys}
    return diagnose("it", workload, training, **keys)


def test_snapshot_preserves_state(tmp_path: Path) -> None:
    workload, training = prepare(run_config(*SMALL[:-5], *DEVICE, "model=resnet20", "model.dropout=0.3"), tmp_path)
    batches = list(training.batches.epoch(0))[:2]
    before = {name: value.clone() for name, value in workload.module.state_dict().items()}
    generator = torch.get_rng_state()
    snapshot(workload, batches, 0, eigenvalues=1, iterations=2)
    assert same(before, dict(workload.module.state_dict()))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in workload.module.parameters())
    assert not list(tmp_path.iterdir())


def test_trace_updates_makes_the_updates_of_training(tmp_path: Path) -> None:
    typed = [*MLP, "model.dropout=0.2", "augmentation=crop_flip", "clip=norm", "clip.max_norm=0.5"]
    weights: list[dict[str, Tensor]] = []
    for is_traced in (True, False):
        workload, training = prepare(run_config(*typed), tmp_path)
        if is_traced:
            trace = trace_updates(workload, training, 6, with_curvature=True)
        else:
            for step, batch in enumerate([*training.batches.epoch(0, 0, 0), *training.batches.epoch(1, 0, 4)][:6]):
                training.run_update(batch, step)
        weights.append({name: value.clone() for name, value in workload.module.state_dict().items()})
    assert same(weights[0], weights[1])
    assert len(trace.losses) == len(trace.norms) == 6 and all(len(each) == 6 for each in trace.ratios.values())
    assert max(trace.clipped) <= 0.5 * (1 + 1e-6) < max(trace.norms)


def test_snapshot_metrics(tmp_path: Path) -> None:
    workload, training = prepare(run_config(*MLP), tmp_path)
    batches = list(training.batches.epoch(0))  # of 25, 25, 25, 15 samples
    result = snapshot(workload, batches, 0, eigenvalues=1, iterations=300)
    assert [layer.name for layer in result.layers] == ["layer1.linear", "layer2.linear", "head"]
    assert {len(norms) for norms in result.gradient_norms.values()} == {3}  # of equal batches
    assert len(result.total_norms) == 4 and result.lags == []
    parameters = list(workload.module.parameters())
    gradients = torch.autograd.grad(differentiable_loss(workload, *batches[0]), parameters)
    assert result.total_norms[0] == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)), rel=1e-6)
    assert result.spectrum is not None
    flat = torch.cat([p.detach().flatten() for p in parameters])
    names = [name for name, _ in workload.module.named_parameters()]

    def loss_at(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in parameters])
        weights = {n: part.view_as(p) for n, part, p in zip(names, parts, parameters, strict=True)}
        inputs, targets = batches[0]
        return workload.loss(torch.func.functional_call(workload.module, weights, (inputs,)), targets)

    dense = torch.autograd.functional.hessian(loss_at, flat)
    assert isinstance(dense, Tensor)
    assert float(result.spectrum.eigenvalues[0]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-6)


def test_gradient_norm_does_not_depend_on_the_number_of_batches(tmp_path: Path) -> None:
    workload, training = prepare(run_config(*MLP), tmp_path)
    [batch, *_] = training.batches.epoch(0)
    once, often = (snapshot(workload, [batch] * n, 0, eigenvalues=0, iterations=1).layers for n in (1, 4))
    for one, several in zip(once, often, strict=True):
        assert several.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-9)
    outputs = workload.module(batch.inputs)
    [gradient] = torch.autograd.grad(workload.loss(outputs, batch.targets), outputs)
    assert once[-1].gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-9)


def test_noise_scale_covers_all_parameters(tmp_path: Path) -> None:
    """Also those of batch norm, which belong to no layer."""
    typed = ["model.norm=batch", "data.subset=null", "data.batch_size=50"]
    workload, training = prepare(run_config(*MLP, *typed), tmp_path)
    batches = list(training.batches.epoch(0))[:4]
    result = snapshot(workload, batches, 0, eigenvalues=0, iterations=1)
    with preserved_state(workload):
        losses = [differentiable_loss(workload, *batch) for batch in batches]
        rows = torch.stack([flat(torch.autograd.grad(loss, list(workload.module.parameters()))) for loss in losses])
    trace = 50 * rows.var(0).sum()  # of the covariance of one sample's gradient
    square = rows.mean(0).square().sum() - trace / 200
    assert result.noise_scale == pytest.approx(float(trace / square), rel=1e-6)


def test_clipped_norms_are_measured_before_the_optimizer(tmp_path: Path) -> None:
    """Schedule-free AdamW overwrites the gradients."""
    pytest.importorskip("schedulefree")
    workload, training = prepare(run_config(*MLP, "optimizer=schedule_free_adamw"), tmp_path)
    trace = trace_updates(workload, training, 3, with_curvature=False)
    assert trace.clipped == pytest.approx(trace.norms, rel=1e-6)
    assert len(trace.rates) == 3


def test_clipped_norms_of_several_evaluations_belong_to_the_first(tmp_path: Path) -> None:
    """As the norms before clipping: SAM's second gradient is of other weights."""
    workload, training = prepare(run_config(*MLP, "optimizer=sam", "optimizer.rho=2"), tmp_path)
    trace = trace_updates(workload, training, 3, with_curvature=False)
    assert trace.clipped == pytest.approx(trace.norms, rel=1e-6)


def test_plots_frozen_layers_at_their_depth(tmp_path: Path) -> None:
    result = _diagnosed(tmp_path, "optimizer.groups=[{match: 'layer1*', freeze: true}]", eigenvalues=0)
    depth = plots([result], "title")["depth"]
    weights = _axes(depth, "weights' gradient")
    heights = weights.lines[0].get_ydata()
    assert math.isnan(heights[0]) and all(map(math.isfinite, heights[1:])) and len(heights) == 3
    assert weights.get_xlim() == _axes(depth, "fraction of").get_xlim() == _axes(depth, "standard").get_xlim()


def test_curvature_along_update_matches_second_difference(tmp_path: Path) -> None:
    """The second difference of losses along the update is d'Hd to second order."""
    workload, training = prepare(run_config(*MLP, "schedule=constant", "optimizer.lr=1e-3"), tmp_path)
    before = [p.detach().clone() for p in workload.module.parameters()]
    trace = trace_updates(workload, training, 1, with_curvature=True)
    square = sum(
        float((p.detach() - old).square().sum()) for p, old in zip(workload.module.parameters(), before, strict=True)
    )
    at = dict(zip(STEP_FRACTIONS, trace.along, strict=True))
    second = (at[0.5] - 2 * at[0.0] + at[-0.5]) / 0.25
    assert second / square == pytest.approx(trace.curvatures[0], rel=1e-2)
    assert at[0.0] == pytest.approx(trace.losses[0], rel=1e-12)


def test_reports_divergence(tmp_path: Path) -> None:
    result = _diagnosed(tmp_path, "precision=fp32", "model.activation=relu", "optimizer.lr=1e30", eigenvalues=0)
    assert "became" in result.trace.ended or "not finite" in result.trace.ended
    assert len(result.trace.losses) < 4


def _axes(figure: Any, label: str) -> Any:
    [result] = [axes for axes in figure.axes if label in axes.get_ylabel() and axes.get_visible()]
    return result


def test_plots_a_curve_per_model_and_snapshot(tmp_path: Path) -> None:
    result = [_diagnosed(tmp_path), _diagnosed(tmp_path, "init=xavier_normal")]
    drawn = plots(result, "title")
    assert set(drawn) == {"activations", "inputs", "gradients", "depth", "updates", "curvature"}
    assert len(_axes(drawn["depth"], "standard deviation").lines) == 4
    assert len(_axes(drawn["depth"], "weights' gradient").collections) == 4
    panels = [axes for axes in drawn["activations"].axes if axes.get_visible()]
    assert len(panels) == 4 and all(axes.patches for axes in panels)  # two activations, two rows
    assert len(_axes(drawn["curvature"], "eigenvalues").lines) == 4
    assert len(_axes(drawn["updates"], "loss").lines) == 2
    alone = plots(result[:1], "title")
    assert len(_axes(alone["updates"], "weights").lines) == 3 + 1  # one per layer, and the reference line
    drawn["depth"].savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_plots_time_lag_before_and_after_clipping(tmp_path: Path) -> None:
    typed = [*SMALL[:-5], *DEVICE, "model=rnn", "model.hidden=6", "clip=norm", "clip.max_norm=0.01"]
    workload, training = prepare(run_config(*typed), tmp_path)
    result = diagnose("rnn", workload, training, batches=1, updates=1, eigenvalues=0, iterations=1)
    assert len(result.before.lags[0].states) == 7  # of 8 rows
    assert 0 < clipping_factor(result) < 0.1
    figure = plots([result], "title")["time_lag"]
    assert [len(axes.lines) for axes in figure.axes] == [1, 2]


def test_spread_layers(tmp_path: Path) -> None:
    layers: Any = [None] * 56
    assert (
        spread_layers(layers) == [0, 11, 22, 33, 44, 55]
        and spread_layers(layers[:2]) == [0, 1]
        and spread_layers(layers[:1]) == [0]
    )


def test_prepares_gpu_checkpoint_on_a_cpu(tmp_path: Path) -> None:
    """CUDA graphs set capturable=true in the checkpoint, which torch rejects on a CPU."""
    lines = [*SMALL, "optimizer=adamw", "+optimizer.fused=false", "epochs=1"]
    start(tmp_path, *lines)
    checkpoint = load(tmp_path / "checkpoints/last.pt")
    checkpoint.optimizer["param_groups"][0]["capturable"] = True
    _, training = prepare(run_config(*lines), tmp_path / "other", checkpoint)
    batch = next(iter(training.batches.epoch(1)))
    training.run_update(batch, training.progress.step)
    assert not training.step.optimizer.param_groups[0]["capturable"]


def test_prepares_checkpoint_of_a_run_with_automatic_learning_rate(tmp_path: Path) -> None:
    lines = [*SMALL, "optimizer.lr=auto", "schedule=constant", "epochs=1"]
    summary = start(tmp_path, *lines)
    _, training = prepare(run_config(*lines), tmp_path / "other", load(tmp_path / "checkpoints/last.pt"))
    assert training.step.rate == summary["found_lr"]
