"""Measuring a model before its training and after some updates of it: what the pictures and verdicts are made of."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from dlopt.analysis.diagnosis.curvature import (
    GradientSpread,
    Spectrum,
    curvature_along,
    flat,
    hessian_product,
    largest_eigenvalues,
    losses_along,
)
from dlopt.analysis.diagnosis.layers import LayerProbe, LayerStatistics, TimeLag, TimeLagProbe, layer_parameters, norms
from dlopt.errors import RunError, UserError
from dlopt.training.build import Workload
from dlopt.training.clipping import gradient_norm
from dlopt.training.step import frozen_statistics
from dlopt.training.trainer import Trainer

Batch = tuple[Tensor, Tensor]

SHARES = tuple(i / 4 for i in range(-2, 11))
"""Parts of an update at which the loss is looked at: from half an update back to two and a half ahead."""


@dataclass(frozen=True)
class Snapshot:
    """A model at one set of weights, seen on a few mini-batches without being changed."""

    updates: int  # done so far
    loss: float
    layers: list[LayerStatistics]
    gradient_norms: dict[str, list[float]]  # of the weights of each layer, one per mini-batch
    total_norms: list[float]  # of all parameters together
    noise_scale: float  # in samples
    noise_scales: dict[str, float]  # by layer
    spectrum: Spectrum | None
    lags: list[TimeLag]


@dataclass
class Path:
    """The updates between two snapshots. `ratios[name]`: ||update|| / ||weights|| of a layer, per update."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the gradient, before clipping
    clipped: list[float] = field(default_factory=list)  # and after
    ratios: dict[str, list[float]] = field(default_factory=dict)
    curvatures: dict[int, float] = field(default_factory=dict)  # update -> d'Hd / d'd along it
    along: list[float] = field(default_factory=list)  # the loss at `SHARES` of the last update
    ended: str = ""  # why it ended early


@dataclass(frozen=True)
class Diagnosis:
    label: str
    before: Snapshot
    path: Path
    after: Snapshot | None  # None: no update was asked for, or the first one failed

    @property
    def snapshots(self) -> list[Snapshot]:
        return [self.before] if self.after is None else [self.before, self.after]


def diagnose(
    label: str, workload: Workload, trainer: Trainer, *, batches: int, updates: int, eigenvalues: int, iterations: int
) -> Diagnosis:
    """Looks at the model on `batches` mini-batches, trains it for `updates`, looks again.

    `eigenvalues`: how many of the Hessian's largest, by `iterations` of Lanczos; 0: nothing of the curvature.
    """
    progress = trainer.progress
    seen = list(islice(trainer.batches.epoch(progress.epoch, 0, 0), batches))
    before = snapshot(workload, seen, progress.step, eigenvalues=eigenvalues, iterations=iterations)
    path = walk(workload, trainer, updates, with_curvature=eigenvalues > 0)
    if not path.losses:
        return Diagnosis(label, before, path, None)
    done = progress.step + len(path.losses)
    after = snapshot(workload, seen, done, eigenvalues=eigenvalues, iterations=iterations)
    return Diagnosis(label, before, path, after)


def snapshot(
    workload: Workload, batches: Sequence[Batch], updates: int, *, eigenvalues: int, iterations: int
) -> Snapshot:
    """Statistics in training mode; weights, batch-norm statistics and generators are left as they were."""
    module = workload.module
    module.train()
    layers = layer_parameters(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    probe, lag = LayerProbe(module, keep=20_000), TimeLagProbe(module)
    spread, totals, losses = GradientSpread(list(layers)), [], []
    with untouched(workload):
        for number, (inputs, targets) in enumerate(batches):
            with probe.watching(), lag.watching() if number == 0 else contextlib.nullcontext():
                loss = loss_of(workload, inputs, targets)
                found = torch.autograd.grad(loss, trained, allow_unused=True)
            gradients = {p: torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)}
            losses.append(float(loss.detach()))
            totals.append(float(norms([list(gradients.values())])[0]))
            if len(targets) == len(batches[0][1]):  # the noise scale wants equal batches
                spread.add([[gradients[p] for p in each] for each in layers.values()])
        spectrum = _spectrum(workload, batches[0], trained, eigenvalues, iterations)
    order = [layer.name for layer in probe.layers if layer.name in layers]
    total, by_name = spread.noise_scale(len(batches[0][1]))
    columns = dict(zip(spread.names, spread.norms().T.tolist(), strict=True))
    scales = dict(zip(spread.names, by_name, strict=True))
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
    )


def loss_of(workload: Workload, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss with its graph, uncompiled, so that hooks fire and second derivatives exist."""
    autocast = workload.precision.autocast
    loss: Tensor = autocast(workload.loss)(autocast(workload.module)(inputs), targets)
    return loss


@contextlib.contextmanager
def untouched(workload: Workload) -> Iterator[None]:
    """Within, batch norm leaves its running statistics alone; afterwards the random generators are what they were."""
    devices = [workload.device] if workload.device.type == "cuda" else []
    with frozen_statistics(workload.module), torch.random.fork_rng(devices), torch.enable_grad():
        yield


def _spectrum(
    workload: Workload, batch: Batch, parameters: Sequence[Tensor], count: int, iterations: int
) -> Spectrum | None:
    if not count:
        return None
    iterations = max(iterations, count)
    return largest_eigenvalues(lambda: loss_of(workload, *batch), parameters, count=count, iterations=iterations)


def walk(workload: Workload, trainer: Trainer, updates: int, *, with_curvature: bool) -> Path:
    """Makes the first `updates` of a run (or the next ones, after a checkpoint), and notes what they do.

    The curvature along an update, which needs a Hessian-vector product, is looked at in eight of them.
    """
    path, training_step, progress = Path(), trainer.step, trainer.progress
    layers = layer_parameters(workload.module)
    parameters = training_step.parameters
    looked_at = {round(i * (updates - 1) / 7) for i in range(8)} if with_curvature else set()
    workload.module.train()
    for number, (inputs, targets) in enumerate(islice(_endless(trainer), updates)):
        before = {p: p.detach().clone() for p in parameters}
        try:
            training_step.update(inputs, targets, progress.step + number, trainer.sums, log_norm=True)
            training_step.check_updates()
        except UserError:
            raise
        except RunError as error:
            path.ended = str(error)
            break
        step = {p: p.detach() - start for p, start in before.items()}
        moved = norms([[step[p] for p in each if p in step] for each in layers.values()])
        sizes = norms([[before[p] for p in each if p in before] for each in layers.values()])
        for name, ratio in zip(layers, (moved / sizes).tolist(), strict=True):
            path.ratios.setdefault(name, []).append(ratio)
        path.losses.append(trainer.sums.since_last("")["loss"])
        path.norms.append(math.nan if training_step.norm is None else float(training_step.norm))
        path.clipped.append(float(gradient_norm(parameters)))
        if number in looked_at:
            with untouched(workload), _at(before):
                product = hessian_product(loss_of(workload, inputs, targets), parameters)
                path.curvatures[number] = curvature_along(product, flat(list(step.values())))
                if number == updates - 1:
                    deltas = list(step.values())
                    path.along = losses_along(lambda: loss_of(workload, inputs, targets), parameters, deltas, SHARES)  # noqa: B023
    return path


def _endless(trainer: Trainer) -> Iterator[Batch]:
    progress = trainer.progress
    epoch, position, step = progress.epoch, progress.position, progress.step
    while True:
        for batch in trainer.batches.epoch(epoch, position, step):
            yield batch
            step += 1
        epoch, position = epoch + 1, 0


@contextlib.contextmanager
def _at(weights: dict[torch.nn.Parameter, Tensor]) -> Iterator[None]:
    """Within, the parameters hold these `weights`."""
    kept = {p: p.detach().clone() for p in weights}
    with torch.no_grad():
        for p, value in weights.items():
            p.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept.items():
                p.copy_(value)
