"""Builds a trainer and measures its model before and after some updates: data of the plots and verdicts."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from dlopt.data.batches import Batch
from dlopt.extend import (
    Checkpoint,
    Component,
    RunConfig,
    RunError,
    Trainer,
    UserError,
    Workload,
    build_workload,
    probe_trainer,
)
from dlopt.instruments.curvature import (
    GradientSpread,
    Spectrum,
    curvature_along,
    hessian_product,
    largest_eigenvalues,
    losses_along,
    restoring,
)
from dlopt.instruments.diagnostics import differentiable_loss, preserved_state
from dlopt.instruments.layers import (
    LayerProbe,
    LayerStatistics,
    Moments,
    layer_parameters,
    moments_of,
    norms,
    norms_by_layer,
)
from dlopt.lab.diagnosis.probes import AttentionEntropy, AttentionProbe, TimeLag, TimeLagProbe
from dlopt.optim.common import flat
from dlopt.trained.distillation import with_teacher
from dlopt.training.builders.workload import load_weights
from dlopt.training.progress import endless_batches
from dlopt.training.step import Observer, Step

STEP_FRACTIONS = tuple(i / 4 for i in range(-2, 11))
"""Fractions of an update at which the loss is evaluated: from half an update back to 2.5 updates ahead."""


@dataclass(frozen=True)
class Snapshot:
    """Statistics of a model at fixed weights on a few mini-batches."""

    updates: int  # done so far
    loss: float
    layers: list[LayerStatistics]
    gradient_norms: dict[str, list[float]]  # of the weights of each layer, one per mini-batch
    total_norms: list[float]  # of all parameters together
    noise_scale: float  # in samples
    noise_scales: dict[str, float]  # by layer
    spectrum: Spectrum | None
    lags: list[TimeLag]
    attention: list[AttentionEntropy]


@dataclass
class UpdateTrace:
    """Metrics of each update between two snapshots. `ratios[name]`: ||update|| / ||weights|| of a layer."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the gradient, before clipping
    clipped: list[float] = field(default_factory=list)  # and after
    rates: list[float] = field(default_factory=list)  # learning rates
    ratios: dict[str, list[float]] = field(default_factory=dict)
    curvatures: dict[int, float] = field(default_factory=dict)  # update -> d'Hd / d'd along it
    along: list[float] = field(default_factory=list)  # the loss at `STEP_FRACTIONS` of the last update
    ended: str = ""  # the error that stopped the training early


class ClippedNorm(Observer):
    """Measures the norm of the clipped gradients before the optimizer: schedule-free AdamW overwrites them.

    Of an update's first evaluation, at the weights of its loss, if `norm` is NaN before the update.
    """

    def __init__(self) -> None:
        self.norm = math.nan

    def after_clip(self, step: Step) -> None:
        if math.isnan(self.norm):
            self.norm = float(step.gradient_norm())


@dataclass(frozen=True)
class Diagnosis:
    label: str
    before: Snapshot
    trace: UpdateTrace
    after: Snapshot | None  # None without updates, or if the first update failed
    inputs: Moments | None = None  # None for tokens
    chance: float | None = None  # the cross-entropy of equal probabilities; None for other losses

    @property
    def snapshots(self) -> list[Snapshot]:
        return [self.before] if self.after is None else [self.before, self.after]


def prepare(run_config: RunConfig, folder: Path, checkpoint: Checkpoint | None = None) -> tuple[Workload, Trainer]:
    """Builds data, model and optimizer as `dlopt train` does, or restores them from a checkpoint.

    Writes nothing; `folder` is a placeholder for the run folder.
    """
    workload = build_workload(run_config, checkpoint)
    if checkpoint is not None and run_config.auto_lr:
        assert checkpoint.found_lr is not None
        workload = workload.with_lr(checkpoint.found_lr)
    trainer = probe_trainer(with_teacher(workload), folder, checkpoint, observers=[ClippedNorm()])
    if checkpoint is not None:
        workload.module.load_state_dict(checkpoint.model)
        trainer.load_optimizer(checkpoint.optimizer)
        trainer.step.schedule.load_state_dict(checkpoint.schedule)
        progress = trainer.progress
        progress.epoch, progress.position, progress.step = checkpoint.epoch, checkpoint.position, checkpoint.step
    elif run_config.settings.init_from is not None:
        load_weights(workload.module, Path(run_config.settings.init_from))
    return workload, trainer


def has_skips(model: Component) -> bool:
    """Returns whether the model has skip connections, by its class name and keys."""
    name = model.target.__name__
    return bool(model.arguments.get("residual", any(word in name for word in ("ResNet", "ViT", "GPT", "ResidualMLP"))))


def diagnose(
    label: str, workload: Workload, trainer: Trainer, *, batches: int, updates: int, eigenvalues: int, iterations: int
) -> Diagnosis:
    """Takes a snapshot on `batches` mini-batches, trains for `updates` updates, takes a second snapshot.

    `eigenvalues`: number of the Hessian's largest eigenvalues, by `iterations` of Lanczos; 0 skips all curvature.
    """
    progress = trainer.progress
    mini_batches = list(islice(trainer.batches.epoch(progress.epoch, 0, 0), batches))
    before = snapshot(workload, mini_batches, progress.step, eigenvalues=eigenvalues, iterations=iterations)
    trace = trace_updates(workload, trainer, updates, with_curvature=eigenvalues > 0)
    inputs = moments_of([batch.inputs for batch in mini_batches])
    chance = math.log(workload.task.outputs) if workload.run_config.loss.target.__name__ == "CrossEntropy" else None
    if not trace.losses:
        return Diagnosis(label, before, trace, None, inputs, chance)
    done = progress.step + len(trace.losses)
    after = snapshot(workload, mini_batches, done, eigenvalues=eigenvalues, iterations=iterations)
    return Diagnosis(label, before, trace, after, inputs, chance)


def snapshot(
    workload: Workload, batches: Sequence[Batch], updates: int, *, eigenvalues: int, iterations: int
) -> Snapshot:
    """Computes statistics in training mode; leaves weights, BatchNorm statistics and generators unchanged."""
    module = workload.module
    module.train()
    layers = layer_parameters(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    in_layers = {p for group in layers.values() for p in group}
    others = [p for p in trained if p not in in_layers]  # of embeddings and normalizations
    groups = layers | ({"": others} if others else {})
    probe, lag, attention = LayerProbe(module, keep=20_000), TimeLagProbe(module), AttentionProbe(module)
    spread, totals, losses = GradientSpread(), [], []
    with preserved_state(workload):
        for index, (inputs, targets) in enumerate(batches):
            with probe.recording(), attention.recording(), lag.recording() if index == 0 else contextlib.nullcontext():
                loss = differentiable_loss(workload, inputs, targets, index)
                values = torch.autograd.grad(loss, trained, materialize_grads=True)
            gradients = dict(zip(trained, values, strict=True))
            losses.append(float(loss.detach()))
            totals.append(float(norms([list(gradients.values())])[0]))
            if len(targets) == len(batches[0].targets):  # the noise scale requires equal batches
                spread.add([[gradients[p] for p in group] for group in groups.values()])
        spectrum = None
        if eigenvalues:
            loss_of_batch = partial(differentiable_loss, workload, *batches[0])
            iterations = max(iterations, eigenvalues)
            spectrum = largest_eigenvalues(loss_of_batch, trained, count=eigenvalues, iterations=iterations)
    order = [layer.name for layer in probe.layers if layer.name in layers]
    total, by_group = spread.noise_scale(len(batches[0].targets))
    columns = dict(zip(groups, spread.norms().T.tolist(), strict=True))
    scales = dict(zip(groups, by_group, strict=True))
    return Snapshot(
        updates=updates,
        loss=sum(losses) / len(losses),
        layers=probe.layers,
        gradient_norms={name: columns[name] for name in order},
        total_norms=totals,
        noise_scale=total,
        noise_scales={name: scales[name] for name in order},
        spectrum=spectrum,
        lags=lag.lags(),
        attention=attention.entropies(),
    )


def trace_updates(workload: Workload, trainer: Trainer, updates: int, *, with_curvature: bool) -> UpdateTrace:
    """Makes the first `updates` of a run (or the next ones after a checkpoint) and records their metrics.

    The trainer's observer is a `ClippedNorm`. Measures the curvature along the update in eight of them, as it
    needs a Hessian-vector product.
    """
    trace, training_step, progress = UpdateTrace(), trainer.step, trainer.progress
    [clipped] = training_step.observers
    assert isinstance(clipped, ClippedNorm)
    layers = layer_parameters(workload.module)
    parameters = training_step.parameters
    curvature_updates = {round(i * (updates - 1) / 7) for i in range(8)} if with_curvature else set()
    workload.module.train()
    for number, batch in enumerate(islice(endless_batches(trainer.batches, trainer.progress), updates)):
        before, clipped.norm = {p: p.detach().clone() for p in parameters}, math.nan
        try:
            result = trainer.run_update(batch, progress.step + number, log_norm=True)
            training_step.check_updates()
        except UserError:
            raise
        except RunError as error:
            trace.ended = str(error)
            break
        step = {p: p.detach() - start for p, start in before.items()}
        ratios = norms_by_layer(layers, step) / norms_by_layer(layers, before)
        for name, ratio in zip(layers, ratios.tolist(), strict=True):
            trace.ratios.setdefault(name, []).append(ratio)
        trace.losses.append(trainer.train_metrics.since_last()["loss"])
        trace.norms.append(math.nan if result.norm is None else float(result.norm))
        trace.clipped.append(clipped.norm)
        trace.rates.append(float(training_step.rate))
        if number in curvature_updates:
            with preserved_state(workload), restoring(parameters):
                with torch.no_grad():
                    for p, start in before.items():
                        p.copy_(start)
                deltas = list(step.values())
                product = hessian_product(differentiable_loss(workload, *batch), parameters)
                trace.curvatures[number] = curvature_along(product, flat(deltas))
                if number == updates - 1:
                    loss = partial(differentiable_loss, workload, *batch)
                    trace.along = losses_along(loss, parameters, deltas, STEP_FRACTIONS)
    return trace
