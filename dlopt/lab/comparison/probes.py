"""Metrics computed after a run from its checkpoints; each probe returns (progress, value) per checkpoint, in order."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dlopt.config.parsing import parse
from dlopt.config.resolve import resolve_saved
from dlopt.data.batches import Batches
from dlopt.data.samples import Samples
from dlopt.extend import (
    Checkpoint,
    UserError,
    Workload,
    build_workload,
    evaluation_batches,
    load_checkpoint,
    training_batches,
)
from dlopt.lab.comparison import decay, measures
from dlopt.models.layers import frozen_statistics
from dlopt.training.evaluate import evaluate

Progress = Mapping[str, Any]
"""epoch, step and seconds."""
Values = list[tuple[Progress, float]]
"""(progress, value) of each checkpoint."""
Probe = Callable[[Path], Values]


def checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """Yields the checkpoints of a run in the order of their updates."""
    kept = sorted((folder / "checkpoints").glob("step-*.pt"), key=lambda path: int(path.stem.partition("-")[2]))
    steps = set()
    for path in [*kept, folder / "checkpoints" / "last.pt"]:
        if path.is_file() and (checkpoint := load_checkpoint(path)).step not in steps:
            steps.add(checkpoint.step)
            yield checkpoint


def _progress(checkpoint: Checkpoint) -> Progress:
    return {"epoch": checkpoint.epoch, "step": checkpoint.step, "seconds": checkpoint.seconds}


def effective_rate(folder: Path) -> Values:
    """Computes the median over all weights of the effective learning rate, an adaptive method's factor of the gradient.

    Adagrad: lr / (sqrt(sum g^2) + eps), with the lr of its decay; RMSprop: lr / (sqrt(E g^2) + eps), centered: with the
    variance E g^2 - (E g)^2; Adam: the same with bias-corrected E g^2 (AMSGrad: its largest value); Adadelta:
    lr sqrt(E delta^2 + eps) / sqrt(E g^2 + eps); others: lr.
    """
    values = []
    for checkpoint in checkpoints(folder):
        groups, states = checkpoint.optimizer["param_groups"], checkpoint.optimizer["state"]
        rates = [_rates(states.get(index, {}), group).flatten() for group in groups for index in group["params"]]
        values.append((_progress(checkpoint), float(torch.cat(rates).median())))
    return values


def _rates(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    lr, eps = float(group["lr"]), group.get("eps", 0.0)
    if "sum" in state:
        if group.get("lr_decay"):
            lr /= 1 + (float(state["step"]) - 1) * group["lr_decay"]
        return lr / (state["sum"].sqrt() + eps)
    if "acc_delta" in state:
        return lr * (state["acc_delta"] + eps).sqrt() / (state["square_avg"] + eps).sqrt()
    if "square_avg" in state:
        return lr / ((state["square_avg"] - state.get("grad_avg", 0.0) ** 2).sqrt() + eps)
    if "exp_avg_sq" in state and "step" in state:  # Prodigy counts none, and does not correct the bias
        correction = 1 - group["betas"][1] ** float(state["step"])
        return lr / ((state.get("max_exp_avg_sq", state["exp_avg_sq"]) / correction).sqrt() + eps)
    return torch.tensor([lr])


def _models(folder: Path, *, initial: bool = False) -> Iterator[tuple[Progress, Workload]]:
    """Yields (progress, workload) with the weights of each checkpoint; the workload is the same object.

    `initial`: first with the initial weights.
    """
    workload: Workload | None = None
    for checkpoint in checkpoints(folder):
        if workload is None:
            workload = build_workload(parse(resolve_saved(checkpoint.config)), checkpoint)
            if initial:
                yield {"epoch": 0, "step": 0, "seconds": 0.0}, workload
        workload.module.load_state_dict(checkpoint.model)
        yield _progress(checkpoint), workload


def input_drift(folder: Path) -> Values:
    """Computes how far the inputs of hidden layers have drifted since the previous checkpoint.

    For each input of a linear layer except the first: the Wasserstein distance sqrt((m - m')^2 + (s - s')^2) between
    normal distributions with its mean and standard deviation over 500 training samples at both checkpoints, in units of
    the layer's mean standard deviation at the previous one; averaged over inputs and layers. BatchNorm uses batch
    statistics.
    """
    inputs: Tensor | None = None
    values: Values = []
    before: list[tuple[Tensor, Tensor]] = []
    for progress, workload in _models(folder):
        if inputs is None:
            subset = workload.dataset.train.select(torch.arange(min(500, len(workload.dataset.train))))
            inputs = torch.cat([batch for batch, _ in evaluation_batches(workload, subset).epoch(0)])
        now = _moments(workload.module.train(), inputs)
        if before:
            distances = [
                ((mean - old).square() + (spread - old_spread).square()).sqrt().mean() / old_spread.mean()
                for (mean, spread), (old, old_spread) in zip(now, before, strict=True)
            ]
            values.append((progress, float(torch.stack(distances).mean())))
        before = now
    return values


def first_updates(folder: Path) -> Values:
    """Computes the size of the updates before the first checkpoint, in learning rates: |theta - theta_0| / (n t lr).

    |theta - theta_0| is the sum over the n weights of how far each has moved in t updates, at a constant learning rate.
    """
    models = _models(folder, initial=True)
    _, workload = next(models)
    initial = flattened(workload.module)
    progress, workload = next(models)
    lr = workload.run_config.optimizer.arguments["lr"]
    moved = (flattened(workload.module) - initial).abs().mean()
    return [(progress, float(moved) / (progress["step"] * lr))]


def flattened(module: nn.Module) -> Tensor:
    """Returns all parameters as one vector, a copy."""
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def gradient_variance(folder: Path) -> Values:
    """Computes the variance of mini-batch gradients relative to a random order of the samples (1: random order).

    E ||g_b - g||^2 over the batches of ten epochs in the order of the run's sampler, divided by its expectation over
    all orders of the N samples, s^2 / B (N - B) / (N - 1) with s^2 = E ||g_i - g||^2 (Cochran 1977, theorem 2.2).
    Computes each sample's gradient once, alone, without augmentation, so models with BatchNorm are not supported. The
    first value is for the initial weights.
    """
    batches: Batches | None = None
    values: Values = []
    for progress, workload in _models(folder, initial=True):
        batches = training_batches(workload) if batches is None else batches
        values.append((progress, _variance(workload, batches, progress["epoch"])))
    return values


def _variance(workload: Workload, batches: Batches, epoch: int) -> float:
    workload.module.train()
    rows = []
    for inputs, targets in evaluation_batches(workload, workload.dataset.train).epoch(0):
        for sample, target in zip(inputs.split(1), targets.split(1), strict=True):
            rows.append(measures.gradient(workload, workload.loss(workload.module(sample), target)))
    deviations = torch.stack(rows)
    deviations = deviations - deviations.mean(0)
    size, count = batches.batch_size, len(rows)
    expected = deviations.square().sum(1).mean() / size * (count - size) / (count - 1)
    full = count // size * size  # the last batch may be smaller
    orders = [batches.sampler.order(number)[:full] for number in range(epoch, epoch + 10)]
    means = torch.cat([deviations[order].view(-1, size, deviations.shape[1]).mean(1) for order in orders])
    return float(means.square().sum(1).mean() / expected)


@torch.no_grad()
def _moments(module: nn.Module, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns mean and standard deviation over the samples for each linear layer's inputs, except the first layer's."""
    moments: list[tuple[Tensor, Tensor]] = []

    def record(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(layer, nn.Linear):
            moments.append((arguments[0].mean(0), arguments[0].std(0)))

    with register_module_forward_pre_hook(record), frozen_statistics(module):
        module(inputs)
    return moments[1:]


def evaluated_train_loss(workload: Workload) -> float:
    """Computes the loss on the training set as on the validation set: without dropout and augmentation."""
    return _evaluated_loss(workload, workload.dataset.train)


def evaluated_gap(workload: Workload) -> float:
    """Computes the validation loss minus the training loss, both in evaluation mode.

    Raises `UserError` without validation samples.
    """
    if workload.dataset.val is None:
        raise UserError("comparison.metrics: evaluated_gap needs validation samples; set data.val_split")
    return _evaluated_loss(workload, workload.dataset.val) - evaluated_train_loss(workload)


def _evaluated_loss(workload: Workload, samples: Samples) -> float:
    batches = evaluation_batches(workload, samples).epoch(0)
    found = evaluate(workload.module, workload.module, batches, workload.loss, task=workload.task, split="val")
    assert found is not None  # not interrupted
    return found["val_loss"]


def _at_checkpoints(measure: Callable[[Workload], float], *, initial: bool = False) -> Probe:
    """Returns the probe that applies `measure` to the model of every checkpoint.

    `initial`: first with the initial weights.
    """

    return lambda folder: [(progress, measure(workload)) for progress, workload in _models(folder, initial=initial)]


def _saturated(name: str, number: int) -> Probe:
    return _at_checkpoints(lambda workload: measures.saturated(workload, number, name), initial=True)


def _of_decay(measure: Callable[[decay.Decays], float]) -> Probe:
    """Returns the probe that applies `measure` to the decay of each weight at every checkpoint."""

    return lambda folder: [
        (progress, measure(decay.decays(workload, checkpoint)))
        for checkpoint, (progress, workload) in zip(checkpoints(folder), _models(folder), strict=True)
    ]


PROBES: Mapping[str, Probe] = {
    "activation_std": _at_checkpoints(measures.activation_std),
    "condition_number": _at_checkpoints(measures.condition_number),
    "decay_correlation": _of_decay(decay.correlation),
    "decay_ratio": _of_decay(decay.ratio),
    "effective_rate": effective_rate,
    "evaluated_gap": _at_checkpoints(evaluated_gap),
    "evaluated_train_loss": _at_checkpoints(evaluated_train_loss),
    "first_updates": first_updates,
    "gradient_bias": _at_checkpoints(measures.gradient_bias),
    "gradient_ratio": _at_checkpoints(measures.gradient_ratio),
    "gradient_variance": gradient_variance,
    "higher_order_effect": _at_checkpoints(measures.higher_order_effect, initial=True),
    "idle_units": _at_checkpoints(measures.idle_units),
    "input_drift": input_drift,
    "input_sensitivity": _at_checkpoints(measures.input_sensitivity),
    "largest_eigenvalue": _at_checkpoints(measures.largest_eigenvalue, initial=True),
    "memory_gradient": _at_checkpoints(measures.memory_gradient),
    "sample_dependence": _at_checkpoints(measures.sample_dependence),
    "saturated_last": _saturated("saturated_last", -1),
    **{f"saturated_{n}": _saturated(f"saturated_{n}", n) for n in (1, 2, 3)},
    "unit_dependence": _at_checkpoints(measures.unit_dependence),
}
